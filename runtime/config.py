"""Engine options, checked once; and the facts that are derived from a model's config."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from porter.runtime.errors import ConfigError

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
LOAD_FORMATS = ("auto", "dummy")

# Where configs of different families say how many positions they know
_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", "max_sequence_length")
_DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class EngineConfig:
    """Everything that decides how one model is served, resolved and checked.

    `model` is a folder, `hf_config` its config, `port` a reference that `load_port` understands. `num_blocks` None
    means as many as memory allows; sizes are in tokens, `gpu_memory_utilization` is a fraction of the device.
    """

    model: Path
    hf_config: Any
    port: str
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    max_model_len_is_given: bool = True
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    quantization: str | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    load_format: str = "auto"
    seed: int = 0
    load_progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "tensor_parallel_size"):
            _check_positive(name, getattr(self, name))
        if self.num_blocks is not None:
            _check_positive("num_blocks", self.num_blocks)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        if self.load_format not in LOAD_FORMATS:
            raise ConfigError(f"load_format {self.load_format!r} is unknown", f"use one of {', '.join(LOAD_FORMATS)}")
        if self.num_blocks is not None and self.num_blocks * self.block_size < self.max_model_len:
            raise ConfigError(
                f"{self.num_blocks} blocks of {self.block_size} tokens can't hold max_model_len {self.max_model_len}",
                "raise num_blocks or lower max_model_len",
            )


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")


def resolve_device(device: str) -> torch.device:
    """The device that `device` names; "auto" takes a GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is unknown", "use auto, cpu or cuda") from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for but torch sees no GPU", "use device='cpu'")
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} can't serve", "use auto, cpu or cuda")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, hf_config: Any) -> torch.dtype:
    """The dtype that `dtype` names; "auto" takes the checkpoint's, float32 if it names none."""
    if dtype == "auto":
        dtype = getattr(hf_config, "dtype", None) or getattr(hf_config, "torch_dtype", None) or torch.float32
    if isinstance(dtype, torch.dtype):
        resolved: torch.dtype | None = dtype
    else:
        resolved = DTYPES.get(str(dtype).removeprefix("torch."))
    if resolved is None or resolved not in DTYPES.values():
        raise ConfigError(f"dtype {dtype!r} can't serve", f"use auto, {', '.join(DTYPES)}")
    return resolved


def resolve_max_model_len(hf_config: Any, requested: int | None) -> int:
    """The longest prompt plus output, at most what the model has positions for."""
    text_config = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    known = [getattr(text_config, name, None) for name in _LENGTH_NAMES]
    limit = next((length for length in known if isinstance(length, int) and length > 0), None)
    if requested is None:
        return limit or _DEFAULT_LENGTH
    _check_positive("max_model_len", requested)
    if limit is not None and requested > limit:
        raise ConfigError(f"max_model_len {requested} is more than the model's {limit} positions", "lower it")
    return requested


def eos_token_ids(hf_config: Any, folder: Path, tokenizer_eos: int | None = None) -> frozenset[int]:
    """The token ids that end a text: those of generation_config.json, else of the config; and the tokenizer's."""
    ids = _read_generation_config(folder).get("eos_token_id", getattr(hf_config, "eos_token_id", None))
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(token for token in (*listed, tokenizer_eos) if token is not None)


def default_sampling(folder: Path) -> dict[str, Any]:
    """The sampling settings that generation_config.json recommends, by SamplingParams' names."""
    found = _read_generation_config(folder)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: found[name] for name in names if found.get(name) is not None} if found.get("do_sample") else {}


def _read_generation_config(folder: Path) -> dict[str, Any]:
    import json

    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", "download it again or delete it") from None
    return found
