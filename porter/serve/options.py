"""What `porter serve` was asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ServeOptions:
    """Options of the server; `engine` holds those of LLM by their names there, the model included.

    `max_queued_requests` counts samples that wait beyond those that run, `max_body_bytes` the bytes of a request's
    body. `shutdown_timeout` and `request_timeout` are seconds; after `max_restarts` restarts of the engine within ten
    minutes the server ends.
    """

    engine: Mapping[str, Any]
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    chat_template: Path | None = None
    generation_config: str = "auto"
    max_logprobs: int = 20
    max_queued_requests: int = 1024
    max_body_bytes: int = 4 * 2**20
    shutdown_timeout: float = 30.0
    max_restarts: int = 3
    log_level: str = "warning"
    registered: Mapping[str, str] = field(default_factory=dict)  # architecture: reference of its port
