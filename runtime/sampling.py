"""What a request asks of sampling, and the sampler that does it for a whole batch at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum

import torch
from torch import nn

from porter.kernels.argmax import argmax
from porter.kernels.draw_tokens import draw_tokens
from porter.runtime.errors import RequestError
from porter.runtime.structured_outputs import AllowedTokens, StructuredOutputs

# A row's nucleus is looked for among this many best tokens before the whole vocabulary is sorted.
NUCLEUS_CANDIDATES = 1024
MAX_LOGPROBS = 1024


class RequestOutputKind(Enum):
    """What a step returns of a request: all so far, only what is new, or nothing before the end."""

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled; every value is checked and a bad one raises RequestError (a ValueError).

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 are off. `max_tokens` None means up to the
    model's length. Filters apply in the order logit_bias and min_tokens, penalties, structured_outputs, temperature,
    min_p, top_k, top_p.
    `logprobs` are of the raw logits: k best tokens and the sampled one at each step. With `seed`, the same request
    gives the same tokens whatever else is in the batch.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    structured_outputs: StructuredOutputs | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stop_strings: tuple[str, ...] = field(init=False, repr=False, default=())
    stop_ids: frozenset[int] = field(init=False, repr=False, default=frozenset())
    # What steps ask of every request: penalties, need of earlier tokens, temperature alone, one argmax alone
    has_penalties: bool = field(init=False, repr=False, compare=False, default=False)
    needs_output: bool = field(init=False, repr=False, compare=False, default=False)
    is_plain: bool = field(init=False, repr=False, compare=False, default=False)
    is_plain_greedy: bool = field(init=False, repr=False, compare=False, default=False)

    def __post_init__(self) -> None:
        for spec in fields(self):
            if spec.name in _NUMBERS:
                _check_number(spec.name, getattr(self, spec.name))
        self._check_lists()
        self._check_combinations()
        self._classify()

    def _check_lists(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop must hold non-empty strings, got {self.stop!r}", "leave empty strings out")
        ids = tuple(self.stop_token_ids or ())
        if not all(_is_int(token) and token >= 0 for token in ids):
            raise RequestError(f"stop_token_ids must hold token ids >= 0, got {self.stop_token_ids!r}")
        for token, bias in (self.logit_bias or {}).items():
            if not (_is_int(token) and token >= 0):
                raise RequestError(f"logit_bias keys must be token ids >= 0, got {token!r}")
            if not (_is_real(bias) and -100 <= bias <= 100):
                raise RequestError(f"logit_bias of token {token} must be between -100 and 100, got {bias!r}")
        object.__setattr__(self, "stop_strings", stop)
        object.__setattr__(self, "stop_ids", frozenset(ids))

    def _check_combinations(self) -> None:
        if self.n > 1 and self.temperature == 0:
            raise RequestError("n must be 1 when temperature is 0", "greedy samples are equal; raise temperature")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        if self.stop_strings and not self.detokenize:
            raise RequestError("stop strings need detokenize=True", "use stop_token_ids to stop without text")
        if self.structured_outputs is not None and self.min_tokens:
            raise RequestError("min_tokens can't go with structured_outputs", "the form decides when an answer ends")

    def _classify(self) -> None:
        penalties = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        filtered = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        needs_output = penalties or self.structured_outputs is not None
        unbiased = self.logprobs is None and not (self.logit_bias or self.min_tokens or needs_output)
        object.__setattr__(self, "has_penalties", penalties)
        object.__setattr__(self, "needs_output", needs_output)
        object.__setattr__(self, "is_plain", unbiased and not filtered)
        object.__setattr__(self, "is_plain_greedy", unbiased and self.temperature == 0)


# name -> (least, least is allowed, most, must be an integer, may be None)
_NUMBERS: dict[str, tuple[float, bool, float, bool, bool]] = {
    "n": (1, True, math.inf, True, False),
    "temperature": (0.0, True, math.inf, False, False),
    "top_p": (0.0, False, 1.0, False, False),
    "top_k": (-1, True, math.inf, True, False),
    "min_p": (0.0, True, 1.0, False, False),
    "repetition_penalty": (0.0, False, math.inf, False, False),
    "presence_penalty": (-2.0, True, 2.0, False, False),
    "frequency_penalty": (-2.0, True, 2.0, False, False),
    "seed": (-(2**63), True, 2**63 - 1, True, True),
    "max_tokens": (1, True, math.inf, True, True),
    "min_tokens": (0, True, math.inf, True, False),
    "logprobs": (0, True, MAX_LOGPROBS, True, True),
    "prompt_logprobs": (0, True, MAX_LOGPROBS, True, True),
}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_number(name: str, value: float | None) -> None:
    least, inclusive, most, integer, optional = _NUMBERS[name]
    if value is None and optional:
        return
    kind = "an integer" if integer else "a number"
    if value is None or not (_is_int(value) if integer else _is_real(value)):
        raise RequestError(f"{name} must be {kind}{' or None' if optional else ''}, got {value!r}")
    if value < least or value > most or (value == least and not inclusive):
        low = f"{'at least' if inclusive else 'more than'} {least:g}"
        high = "" if most == math.inf else f" and at most {most:g}"
        raise RequestError(f"{name} must be {low}{high}, got {value!r}")


@dataclass(frozen=True)
class SparseLogits:
    """Values for some places of the logits: `rows`, `token_ids`, `values`, each [num_entries]."""

    rows: torch.Tensor
    token_ids: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class SamplingMetadata:
    """What the sampler needs for a batch of n rows; a None means that no row uses the feature.

    `temperature`, `min_p`, `top_p` float32 [n], `top_k` int64 [n] (vocab size or more = off, `max_top_k` the largest
    below), `uniform` float64 [n] in [0, 1). `bias` is added; `repetition` holds a penalty for each token seen,
    `frequency` what is subtracted for each generated one; `allowed` excludes all others. `num_logprobs` is the most
    that a row asks for, -1 for none.
    """

    temperature: torch.Tensor | None = None
    min_p: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    uniform: torch.Tensor | None = None
    max_top_k: int = 0
    bias: SparseLogits | None = None
    repetition: SparseLogits | None = None
    frequency: SparseLogits | None = None
    allowed: AllowedTokens | None = None
    num_logprobs: int = -1


GREEDY = SamplingMetadata()


@dataclass(frozen=True)
class LogprobsTensors:
    """`token_ids` and `logprobs` [n, 1 + k], the chosen token first, then the k best; `ranks` [n], from 1."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor


@dataclass(frozen=True)
class SamplerOutput:
    """`token_ids` int64 [n], and the logprobs if any row asked for them."""

    token_ids: torch.Tensor
    logprobs: LogprobsTensors | None = None


class Sampler(nn.Module):
    """Picks one token a row: `(logits [n, vocab], SamplingMetadata) -> SamplerOutput`.

    Random rows invert the cumulative distribution at the row's own uniform number, so that no row depends on another.
    """

    def forward(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        adjusted = _adjust(logits, sampling_metadata)
        token_ids = argmax(adjusted)
        if sampling_metadata.temperature is not None:
            token_ids = torch.where(
                sampling_metadata.temperature > 0, _sample_random(adjusted, sampling_metadata), token_ids
            )
        if sampling_metadata.num_logprobs < 0:
            return SamplerOutput(token_ids)
        return SamplerOutput(token_ids, gather_logprobs(logits, token_ids, sampling_metadata.num_logprobs))


def gather_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> LogprobsTensors:
    """Log-probabilities of `token_ids` [n] and of the k best tokens under `logits` [n, vocab]."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = token_ids.unsqueeze(-1)
    chosen_logprobs = logprobs.gather(-1, chosen)
    ranks = (logprobs > chosen_logprobs).sum(dim=-1) + 1
    best, best_ids = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    return LogprobsTensors(torch.cat((chosen, best_ids), -1), torch.cat((chosen_logprobs, best), -1), ranks)


def _adjust(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    changes = (metadata.bias, metadata.repetition, metadata.frequency, metadata.allowed)
    if all(change is None for change in changes):
        return logits
    logits = logits.float().clone()
    if metadata.bias is not None:
        index = (metadata.bias.rows, metadata.bias.token_ids)
        logits.index_put_(index, metadata.bias.values, accumulate=True)
    if metadata.repetition is not None:
        index = (metadata.repetition.rows, metadata.repetition.token_ids)
        seen, penalty = logits[index], metadata.repetition.values
        logits[index] = torch.where(seen > 0, seen / penalty, seen * penalty)
    if metadata.frequency is not None:
        index = (metadata.frequency.rows, metadata.frequency.token_ids)
        logits.index_put_(index, -metadata.frequency.values, accumulate=True)
    if metadata.allowed is not None:
        rows, forbidden = metadata.allowed.rows, metadata.allowed.forbidden(logits.shape[-1])
        logits[rows] = logits[rows].masked_fill(forbidden, -math.inf)
    return logits


def _sample_random(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    assert metadata.temperature is not None
    assert metadata.uniform is not None
    temperature = torch.where(metadata.temperature > 0, metadata.temperature, 1.0)
    if metadata.min_p is None and metadata.top_k is None and metadata.top_p is None:
        return draw_tokens(logits, temperature, metadata.uniform)
    # The maximum is taken off first so that a tiny temperature can't overflow
    scaled = (logits.float() - logits.float().amax(dim=-1, keepdim=True)) / temperature.unsqueeze(-1)
    if metadata.min_p is not None:
        scaled = scaled.masked_fill_(scaled < metadata.min_p.log().unsqueeze(-1), -math.inf)
    if metadata.top_k is not None or metadata.top_p is not None:
        scaled = scaled.masked_fill_(scaled < _threshold(scaled, metadata).unsqueeze(-1), -math.inf)
    return draw_tokens(scaled, torch.ones_like(temperature), metadata.uniform)


def _threshold(scaled: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """The least logit that top_k and top_p keep, [n]; tokens tied with it are kept too."""
    vocab_size = scaled.shape[-1]
    top_k = metadata.top_k
    if top_k is None:
        top_k = torch.full((len(scaled),), vocab_size, device=scaled.device)
    width = metadata.max_top_k if metadata.top_p is None else max(metadata.max_top_k, NUCLEUS_CANDIDATES)
    threshold, complete = _threshold_among(scaled, min(width, vocab_size), top_k, metadata.top_p)
    if not complete:
        threshold, _ = _threshold_among(scaled, vocab_size, top_k, metadata.top_p)
    return threshold


def _threshold_among(
    scaled: torch.Tensor, width: int, top_k: torch.Tensor, top_p: torch.Tensor | None
) -> tuple[torch.Tensor, bool]:
    best = scaled.topk(width, dim=-1).values
    limited = top_k < scaled.shape[-1]
    kth = best.gather(-1, (top_k.clamp(max=width) - 1).unsqueeze(-1)).squeeze(-1)
    threshold = torch.where(limited, kth, -math.inf)
    if top_p is None:
        return threshold, True
    kept = best.masked_fill(best < threshold.unsqueeze(-1), -math.inf)
    total = torch.where(limited, kept.logsumexp(-1), scaled.logsumexp(-1))
    probs = (kept - total.unsqueeze(-1)).exp()
    before = probs.cumsum(-1) - probs
    # The best token always stays: top_p may be so small that float32 has only 0 for it
    nucleus = best.masked_fill((before >= top_p.unsqueeze(-1)) & (before > 0), math.inf).amin(-1)
    threshold = torch.where(top_p < 1, torch.maximum(nucleus, threshold), threshold)
    reached = (probs.sum(-1) >= top_p) | limited | (top_p >= 1)
    return threshold, width == scaled.shape[-1] or bool(reached.all())
