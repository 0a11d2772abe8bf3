"""The bodies of answers, as OpenAI's API has them."""

import time
from collections.abc import Sequence
from typing import Any, NotRequired

from typing_extensions import TypedDict

from porter.runtime.outputs import Logprob, TokenLogprobs
from porter.serve.messages import RequestDelta

# JSON has no infinity
_LEAST_LOGPROB = -9999.0


class PromptTokensDetails(TypedDict):
    """`cached_tokens` of the prompt were found in the prefix cache."""

    cached_tokens: int


class Usage(TypedDict):
    """Numbers of tokens; several samples of one prompt count it once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptTokensDetails]


class CompletionLogprobs(TypedDict):
    """One entry a token; the first token of a prompt has None."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One sample of `/v1/completions`, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]


class CompletionAnswer(TypedDict):
    """The body of `/v1/completions`, and each event of its stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    """A token that might have come, with its UTF-8 bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    """The token that came, and the best ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """One entry a token."""

    content: list[ContentLogprob]
    refusal: None


class ChatMessage(TypedDict):
    """An answer, or a piece of one."""

    role: NotRequired[str]
    content: NotRequired[str]


class ChatChoice(TypedDict):
    """One sample of `/v1/chat/completions`; `delta` takes the place of `message` in a stream."""

    index: int
    message: NotRequired[ChatMessage]
    delta: NotRequired[ChatMessage]
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[list[int]]


class ChatAnswer(TypedDict):
    """The body of `/v1/chat/completions`, and each event of its stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: NotRequired[Usage | None]


class ModelCard(TypedDict):
    """A model that is served; `max_model_len` counts prompt and answer."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(TypedDict):
    """The body of `/v1/models`."""

    object: str
    data: list[ModelCard]


class TokenizeAnswer(TypedDict):
    """The body of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(TypedDict):
    """The body of `/detokenize`."""

    prompt: str


def usage(prompts: Sequence[list[int]], num_generated: int, num_cached: int) -> Usage:
    """What the prompts and their samples count."""
    num_prompt = sum(len(prompt) for prompt in prompts)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def num_generated(deltas: Sequence[RequestDelta]) -> int:
    """Tokens of all samples."""
    return sum(len(sample.token_ids) for delta in deltas for sample in delta.samples.values())


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def finite(logprob: float) -> float:
    """A logprob that JSON can hold."""
    return max(logprob, _LEAST_LOGPROB)


def spelled(token_id: int, logprob: Logprob) -> str:
    """A token's text; tokens have one whenever the engine has a tokenizer."""
    return logprob.decoded_token if logprob.decoded_token is not None else f"token_id:{token_id}"


def chosen(position: TokenLogprobs) -> tuple[int, Logprob]:
    """The token that came at a position: the first that is listed."""
    return next(iter(position.items()))
