"""Builds a batch's SamplingMetadata from its sequences."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from porter.runtime.sampling import GREEDY, SamplingMetadata, SparseLogits
from porter.runtime.sequence import Sequence
from porter.runtime.structured_outputs import AllowedTokens

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(seeds: npt.NDArray[np.uint64], steps: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """64 random bits for each (seed, step), by the splitmix64 finaliser."""
    with np.errstate(over="ignore"):
        bits = seeds + (steps + np.uint64(1)) * _GOLDEN
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return mixed


def child_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request."""
    return int(mix(np.array([seed % 2**64], dtype=np.uint64), np.array([2**32 + index], dtype=np.uint64))[0])


@dataclass(frozen=True)
class PlainSampling:
    """For each sampled sequence [n]: its engine row and 64 random bits (int64), and its temperature (float32).

    All that sampling by temperature alone needs; `SamplingMetadata` says the rest where a row wants more.
    """

    rows: npt.NDArray[np.int64]
    seeds: npt.NDArray[np.int64]
    temperature: npt.NDArray[np.float32]


def build_sampling_metadata(sequences: list[Sequence], vocab_size: int, device: torch.device) -> SamplingMetadata:
    """What the sampler needs for one row of logits per sequence."""
    if all(seq.params.is_plain_greedy for seq in sequences):
        return GREEDY
    params = [seq.params for seq in sequences]
    max_top_k = max((p.top_k for p in params if 0 < p.top_k < vocab_size), default=0)
    is_random = any(p.temperature > 0 for p in params)
    return SamplingMetadata(
        temperature=_column([p.temperature for p in params], device) if is_random else None,
        min_p=_column([p.min_p for p in params], device) if any(p.min_p > 0 for p in params) else None,
        top_k=_indices([p.top_k if p.top_k > 0 else vocab_size for p in params], device) if max_top_k else None,
        top_p=_column([p.top_p for p in params], device) if any(p.top_p < 1 for p in params) else None,
        uniform=torch.from_numpy(_uniform(sequences)).to(device) if is_random else None,
        max_top_k=max_top_k,
        bias=_sparse((entry for row, seq in enumerate(sequences) for entry in _bias(row, seq)), device),
        repetition=_repetition(sequences, device),
        frequency=_frequency(sequences, device),
        allowed=_allowed(sequences, device),
        num_logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=-1),
    )


def _column(values: npt.ArrayLike, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(device)


def _indices(values: npt.ArrayLike, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)


def _uniform(sequences: list[Sequence]) -> npt.NDArray[np.float64]:
    seeds = np.array([seq.seed for seq in sequences], dtype=np.uint64)
    steps = np.array([seq.num_output for seq in sequences], dtype=np.uint64)
    # 48 bits: the product with a total near 1 stays below the total
    uniform: npt.NDArray[np.float64] = (mix(seeds, steps) >> np.uint64(16)).astype(np.float64) * 2.0**-48
    return uniform


def _bias(row: int, seq: Sequence) -> Iterable[tuple[int, int, float]]:
    for token, bias in (seq.params.logit_bias or {}).items():
        yield row, token, bias
    if seq.num_output < seq.params.min_tokens:
        for token in seq.stop_ids:
            yield row, token, -np.inf


def _sparse(entries: Iterable[tuple[int, int, float]], device: torch.device) -> SparseLogits | None:
    rows, tokens, values = [], [], []
    for row, token, value in entries:
        rows.append(row)
        tokens.append(token)
        values.append(value)
    if not rows:
        return None
    return SparseLogits(_indices(rows, device), _indices(tokens, device), _column(values, device))


def _allowed(sequences: list[Sequence], device: torch.device) -> AllowedTokens | None:
    found = [(row, seq.matcher.mask()) for row, seq in enumerate(sequences) if seq.matcher is not None]
    if not found:
        return None
    masks = torch.from_numpy(np.stack([mask for _, mask in found])).to(device)
    return AllowedTokens(_indices([row for row, _ in found], device), masks)


def _repetition(sequences: list[Sequence], device: torch.device) -> SparseLogits | None:
    found = [
        (row, np.unique(seq.tokens(0, seq.num_tokens)), seq.params.repetition_penalty)
        for row, seq in enumerate(sequences)
        if seq.params.repetition_penalty != 1.0
    ]
    return _concatenate([(row, tokens, np.full(len(tokens), penalty)) for row, tokens, penalty in found], device)


def _frequency(sequences: list[Sequence], device: torch.device) -> SparseLogits | None:
    found = []
    for row, seq in enumerate(sequences):
        params = seq.params
        if seq.output_token_ids and (params.frequency_penalty or params.presence_penalty):
            tokens, counts = np.unique(seq.output_token_ids, return_counts=True)
            found.append((row, tokens, counts * params.frequency_penalty + params.presence_penalty))
    return _concatenate(found, device)


def _concatenate(
    found: list[tuple[int, npt.NDArray[Any], npt.NDArray[Any]]], device: torch.device
) -> SparseLogits | None:
    if not found:
        return None
    rows = np.repeat([row for row, _, _ in found], [len(tokens) for _, tokens, _ in found])
    tokens = np.concatenate([tokens for _, tokens, _ in found])
    values = np.concatenate([values for _, _, values in found])
    return SparseLogits(_indices(rows, device), _indices(tokens, device), _column(values, device))
