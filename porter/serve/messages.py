"""What passes between the HTTP process and the engine process, as pickles over a socket that only they can open."""

import pickle
from dataclasses import dataclass, field
from typing import Any

from porter.runtime.outputs import TokenLogprobs
from porter.runtime.sampling import SamplingParams

# Names of processes that work for a server start like this
PROCESS_PREFIX = "porter-"


@dataclass(frozen=True, slots=True)
class Submit:
    """Answer a prompt."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Abort:
    """Forget a request and give back its blocks."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process."""


@dataclass(frozen=True)
class EngineFacts:
    """What the engine settled on when it started; `device` and `dtype` in torch's words."""

    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    block_size: int
    vocab_size: int
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The state of the engine after a step: samples and blocks now, the rest since it started."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class SampleDelta:
    """What is new of one sample."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def merge(self, later: "SampleDelta") -> None:
        """Take over what came after."""
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


@dataclass(slots=True)
class RequestDelta:
    """What is new of one request; `prompt_logprobs` and `num_cached_tokens` are told with its last one."""

    request_id: str
    samples: dict[int, SampleDelta]
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    first_token_time: float | None = None

    def merge(self, later: "RequestDelta") -> None:
        """Take over what came after."""
        for index, sample in later.samples.items():
            if index in self.samples:
                self.samples[index].merge(sample)
            else:
                self.samples[index] = sample
        self.finished = later.finished
        self.prompt_logprobs, self.num_cached_tokens = later.prompt_logprobs, later.num_cached_tokens


@dataclass(frozen=True, slots=True)
class Report:
    """What one step brought."""

    deltas: list[RequestDelta]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Rejected:
    """The engine can't serve a request."""

    request_id: str
    message: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine process ends; `error` is for a person if it is an EngineError, else a bug's text."""

    error: Any = field(default=None)


def encode(message: object) -> bytes:
    """One message as bytes."""
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def decode(payload: bytes) -> Any:
    """The message in bytes that the other process made."""
    return pickle.loads(payload)
