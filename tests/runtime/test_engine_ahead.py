"""The engine that prepares a step before it knows the tokens of the one before: the same outputs, a step later."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from porter.runtime.engine import LLM, SamplingParams
from porter.runtime.executor import Executor
from porter.runtime.model_runner import Launched, ModelRunner, PromptTargets
from porter.runtime.sampling import GREEDY, SamplingMetadata
from porter.runtime.sampling_batch import PlainSampling
from porter.runtime.step_input import HEADER_FIELDS

Prompts = Callable[..., list[list[int]]]


class AheadRunner(ModelRunner):
    """Runs steps on the CPU as a GPU's runner does: tokens in flight are filled in by it, not by the host."""

    last_tokens: dict[int, int]
    num_unknown = 0

    def launch(
        self,
        buffer: npt.NDArray[np.uint8],
        sampling_metadata: SamplingMetadata | None = None,
        prompt_targets: PromptTargets | None = None,
        plain: PlainSampling | None = None,
    ) -> Launched:
        assert plain is not None
        header = buffer[: HEADER_FIELDS * 8].view(np.int64)
        ids = buffer[HEADER_FIELDS * 8 :][: 8 * int(header[0])].view(np.int64)
        for place in np.flatnonzero(ids < 0):
            ids[place] = self.last_tokens[int(-ids[place] - 1)]
            AheadRunner.num_unknown += 1
        output = self.execute(buffer, sampling_metadata or GREEDY, prompt_targets)
        assert output is not None
        self.last_tokens.update(zip(plain.rows.tolist(), output.token_ids, strict=True))
        return Launched(output)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    AheadRunner.last_tokens = {}
    AheadRunner.num_unknown = 0
    monkeypatch.setattr("porter.runtime.executor._make_runner", AheadRunner)
    monkeypatch.setattr(Executor, "runs_ahead", property(lambda self: True))


def generate(llm: LLM, prompts: list[list[int]], params: Any) -> list[Any]:
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [output.outputs[0] for output in llm.generate(given, params, use_tqdm=False)]  # type: ignore[arg-type]


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize(
    "options", [{}, {"num_blocks": 17}, {"max_num_batched_tokens": 5}, {"max_num_seqs": 2}], ids=str
)
def test_greedy_tokens_are_those_of_transformers(
    options: dict[str, Any], tiny_llama: Callable[..., Any], serve: Callable[..., LLM], prompts: Prompts
) -> None:
    tiny = tiny_llama(2)
    given = prompts(3, 9, 17, 5)
    lengths = [12, 1, 20, 7]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    llm = serve(tiny.folder, **options)
    found = generate(llm, given, params)
    assert [output.token_ids for output in found] == [tiny.greedy(p, n) for p, n in zip(given, lengths, strict=True)]
    assert AheadRunner.num_unknown > 0
    engine = llm.llm_engine
    assert not engine.has_unfinished_requests()
    engine.block_manager.check_integrity([])


@pytest.mark.usefixtures("ahead")
def test_a_stop_token_ends_a_sequence_though_a_step_too_many_ran(
    tiny_llama: Callable[..., Any], serve: Callable[..., LLM], prompts: Prompts
) -> None:
    tiny = tiny_llama(2)
    (prompt,) = prompts(6)
    expected = tiny.greedy(prompt, 9)
    stop = next(token for i, token in enumerate(expected) if i >= 3 and token not in expected[:i])
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop_token_ids=[stop])
    (output,) = generate(serve(tiny.folder), [prompt], params)
    assert output.token_ids == expected[: expected.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


@pytest.mark.usefixtures("ahead")
def test_penalties_wait_for_the_tokens_that_they_need(
    tiny_llama: Callable[..., Any], serve: Callable[..., LLM], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_llama(2)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, repetition_penalty=1.7)
    given = prompts(6, 11)
    found = generate(serve(tiny.folder), given, params)
    assert AheadRunner.num_unknown == 0
    monkeypatch.undo()
    expected = generate(serve(tiny.folder), given, params)
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]


@pytest.mark.usefixtures("ahead")
def test_a_request_that_is_aborted_in_flight_leaves_nothing_behind(
    tiny_llama: Callable[..., Any], serve: Callable[..., LLM], prompts: Prompts
) -> None:
    tiny = tiny_llama(2)
    engine = serve(tiny.folder).llm_engine
    first, second = prompts(6, 11)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine.add_request("a", first, params)
    engine.add_request("b", second, params)
    for _ in range(3):
        engine.step()
    assert engine.abort_request("a") is not None
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[-1].request_id == "b"
    assert outputs[-1].outputs[0].token_ids == tiny.greedy(second, 8)
    engine.block_manager.check_integrity([])


@pytest.mark.usefixtures("ahead")
def test_prefixes_are_shared_once_their_tokens_are_known(
    tiny_llama: Callable[..., Any], serve: Callable[..., LLM], prompts: Prompts
) -> None:
    tiny = tiny_llama(2)
    llm = serve(tiny.folder)
    (prompt,) = prompts(6)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    (output,) = generate(llm, [prompt], params)
    whole = [*prompt, *output.token_ids]
    (again,) = llm.generate([{"prompt_token_ids": whole}], params, use_tqdm=False)
    assert again.num_cached_tokens == 12  # 14 of 15 tokens were computed: three full blocks of 4
    assert again.outputs[0].token_ids == tiny.greedy(whole, 9)


def test_the_runner_of_a_cpu_does_not_run_ahead(tiny_llama: Callable[[int], Any], serve: Callable[..., LLM]) -> None:
    folder: Path = tiny_llama(2).folder
    assert not serve(folder).llm_engine.executor.runs_ahead
