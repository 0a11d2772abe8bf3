"""What a request returns, in vLLM's shapes."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """`rank` counts from 1; `decoded_token` is None without a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]


@dataclass
class RequestMetrics:
    """Times in seconds of time.monotonic(); None until it happened."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class CompletionOutput:
    """One sample: text and tokens so far (or only what is new, with RequestOutputKind.DELTA).

    `finish_reason` is "stop", "length", "abort" or None while it runs; `stop_reason` the stop string or token id that
    ended it, None for the end-of-text token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A request and its samples; `prompt_logprobs` has None for the first token, which nothing precedes."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = field(default=0)
