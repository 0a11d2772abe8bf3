"""Sampling parameters are checked, filters agree with their definitions, rows do not depend on each other."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from porter.runtime.errors import RequestError
from porter.runtime.sampling import Sampler, SamplingMetadata, SamplingParams, gather_logprobs
from porter.runtime.sampling_batch import build_sampling_metadata, child_seed, mix
from porter.runtime.sequence import Sequence

VOCAB = 50
CPU = torch.device("cpu")


def sequence(params: SamplingParams, output: list[int] | None = None, seed: int = 0) -> Sequence:
    return Sequence("r", [1, 2, 3], params, seed=seed, stop_ids=params.stop_ids, output_token_ids=output or [])


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    metadata = build_sampling_metadata(sequences, logits.shape[-1], CPU)
    token_ids: list[int] = Sampler()(logits, metadata).token_ids.tolist()
    return token_ids


def drawn(logits: torch.Tensor, params: SamplingParams, times: int = 2000) -> np.ndarray[Any, Any]:
    """How often each token comes up."""
    sequences = [sequence(params, seed=child_seed(7, i)) for i in range(times)]
    return np.bincount(sample(logits.expand(times, -1), sequences), minlength=logits.shape[-1])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 1.5),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 3.0),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("seed", "a"),
        ("seed", 2**70),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", -1),
        ("prompt_logprobs", True),
        ("stop", [""]),
        ("stop_token_ids", [-1]),
        ("logit_bias", {1: 1000.0}),
        ("logit_bias", {"a": 1.0}),
    ],
)
def test_a_bad_parameter_is_one_line_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, RequestError)
    assert "\n" not in str(caught.value)


def test_greedy_with_several_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="n must be 1"):
        SamplingParams(n=2, temperature=0)


def test_parameters_can_be_replaced() -> None:
    assert replace(SamplingParams(stop="x"), n=2).stop_strings == ("x",)


def test_greedy_takes_the_best(logits: torch.Tensor) -> None:
    assert sample(logits[None], [sequence(SamplingParams(temperature=0))]) == [int(logits.argmax())]


def test_frequencies_follow_the_softmax(logits: torch.Tensor) -> None:
    expected = torch.softmax(logits / 0.7, -1).numpy()
    found = drawn(logits, SamplingParams(temperature=0.7), 20000) / 20000
    assert np.abs(found - expected).max() < 0.015


def test_top_k_keeps_the_k_best(logits: torch.Tensor) -> None:
    counts = drawn(logits, SamplingParams(top_k=3, temperature=5.0))
    assert set(np.flatnonzero(counts)) == set(logits.topk(3).indices.tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: torch.Tensor) -> None:
    probs, order = torch.softmax(logits, -1).sort(descending=True)
    size = int((probs.cumsum(-1) < 0.8).sum()) + 1
    counts = drawn(logits, SamplingParams(top_p=0.8), 5000)
    assert set(np.flatnonzero(counts)) <= set(order[:size].tolist())
    assert counts[order[0]] > 0


def test_top_p_of_a_flat_row_looks_past_the_candidates() -> None:
    counts = drawn(torch.zeros(4000), SamplingParams(top_p=0.9), 3000)
    assert len(np.flatnonzero(counts)) > 1500


def test_top_p_applies_within_top_k() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    counts = drawn(logits, SamplingParams(top_k=2, top_p=0.5))
    assert set(np.flatnonzero(counts)) == {0}


def test_min_p_is_relative_to_the_best() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    counts = drawn(logits, SamplingParams(min_p=0.5))
    assert set(np.flatnonzero(counts)) == {0, 1}


def test_a_tiny_temperature_is_greedy(logits: torch.Tensor) -> None:
    counts = drawn(logits, SamplingParams(temperature=1e-6), 20)
    assert counts[int(logits.argmax())] == 20


def test_a_row_does_not_depend_on_the_others(logits: torch.Tensor) -> None:
    wanted = sequence(SamplingParams(temperature=1.3, top_p=0.95), seed=11)
    others = [
        sequence(SamplingParams(temperature=0)),
        sequence(SamplingParams(top_k=2), seed=3),
        sequence(SamplingParams(repetition_penalty=1.5, min_p=0.1), [4], seed=4),
    ]
    alone = sample(logits[None], [wanted])
    assert sample(logits.expand(4, -1), [*others, wanted])[3:] == alone


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = torch.zeros(VOCAB)
    logits[2], logits[9], logits[5] = 4.0, 3.9, 2.5
    assert sample(logits[None], [sequence(SamplingParams(temperature=0, repetition_penalty=2.0), [9])]) == [5]


def test_repetition_penalty_pushes_negative_logits_down() -> None:
    logits = torch.full((VOCAB,), -5.0)
    logits[2], logits[5] = -1.0, -1.5
    assert sample(logits[None], [sequence(SamplingParams(temperature=0, repetition_penalty=2.0))]) == [5]


@pytest.mark.parametrize(
    ("name", "penalty", "output"), [("presence_penalty", 1.0, [9]), ("frequency_penalty", 0.5, [9, 9])]
)
def test_presence_and_frequency_count_the_output_only(name: str, penalty: float, output: list[int]) -> None:
    logits = torch.zeros(VOCAB)
    logits[9], logits[2] = 4.0, 3.5
    params = SamplingParams(temperature=0, **{name: penalty})  # type: ignore[arg-type]
    assert sample(logits[None], [sequence(params)]) == [9]
    assert sample(logits[None], [sequence(params, output)]) == [2]


def test_logit_bias_and_min_tokens(logits: torch.Tensor) -> None:
    best = int(logits.argmax())
    assert sample(logits[None], [sequence(SamplingParams(temperature=0, logit_bias={7: 100.0}))]) == [7]
    held = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[best])
    assert sample(logits[None], [sequence(held, [1])]) != [best]
    assert sample(logits[None], [sequence(held, [1, 1])]) == [best]


def test_logprobs_are_of_the_raw_logits(logits: torch.Tensor) -> None:
    params = SamplingParams(temperature=0, logprobs=2, logit_bias={7: 100.0})
    metadata = build_sampling_metadata([sequence(params)], VOCAB, CPU)
    found = Sampler()(logits[None], metadata).logprobs
    expected = torch.log_softmax(logits, -1)
    assert found.token_ids.tolist() == [[7, *logits.topk(2).indices.tolist()]]
    torch.testing.assert_close(found.logprobs[0], expected[found.token_ids[0]])
    assert found.ranks.tolist() == [int((expected > expected[7]).sum()) + 1]


def test_more_logprobs_than_tokens_gives_all() -> None:
    assert gather_logprobs(torch.zeros(1, 3), torch.tensor([1]), 9).token_ids.shape == (1, 4)


def test_random_bits_are_well_spread() -> None:
    seeds = np.arange(20000, dtype=np.uint64)
    uniform = (mix(seeds, np.zeros_like(seeds)) >> np.uint64(11)) * 2.0**-53
    assert abs(uniform.mean() - 0.5) < 0.01
    assert len(np.unique(uniform)) == 20000


@pytest.mark.parametrize("top_p", [5e-324, 1e-40, 1e-9])
def test_the_best_token_is_left_however_small_top_p_is(top_p: float) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 0.0]])
    column = torch.full((2,), top_p)
    metadata = SamplingMetadata(torch.ones(2), top_p=column, uniform=torch.tensor([0.99, 0.99], dtype=torch.float64))
    assert Sampler()(logits, metadata).token_ids.tolist() == [1, 1]
