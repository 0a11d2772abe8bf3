"""The engine gives the tokens of a plain full forward, however it batches, chunks, shares or preempts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from porter.runtime.engine import LLM, SamplingParams
from porter.runtime.outputs import RequestOutput

Serve = Callable[..., LLM]
Prompts = Callable[..., list[list[int]]]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
LENGTHS = (1, 4, 5, 17, 30)


def run(llm: LLM, prompts: list[list[int]], params: Any = GREEDY) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="one batch"),
        pytest.param({"max_num_seqs": 1}, id="one at a time"),
        pytest.param({"max_num_batched_tokens": 7}, id="chunks"),
        pytest.param({"max_num_batched_tokens": 1}, id="chunks of one"),
        pytest.param({"block_size": 16}, id="long blocks"),
        pytest.param({"num_blocks": 16}, id="few blocks"),
        pytest.param({"num_blocks": 16, "enable_prefix_caching": False}, id="few blocks, no sharing"),
        pytest.param({"num_blocks": 17, "max_num_batched_tokens": 5, "block_size": 4}, id="few blocks and chunks"),
    ],
)
def test_greedy_tokens_are_those_of_a_full_forward(
    tiny_llama: Any, serve: Serve, prompts: Prompts, options: dict[str, Any]
) -> None:
    llama = tiny_llama(2)
    expected = [llama.greedy(prompt, 10) for prompt in prompts(*LENGTHS)]
    assert tokens(run(serve(llama.folder, **options), prompts(*LENGTHS))) == expected


def test_few_blocks_do_preempt(tiny_llama: Any, serve: Serve, prompts: Prompts) -> None:
    llm = serve(tiny_llama(2).folder, num_blocks=16, enable_prefix_caching=False)
    run(llm, prompts(*LENGTHS))
    assert llm.llm_engine.scheduler.num_preemptions > 0
    assert llm.llm_engine.block_manager.num_free_blocks == 16


def test_a_shared_prefix_is_computed_once(tiny_llama: Any, serve: Serve, prompts: Prompts) -> None:
    llama = tiny_llama(2)
    llm = serve(llama.folder)
    run(llm, prompts(30))
    again = run(llm, prompts(30, 23))
    assert [output.num_cached_tokens for output in again] == [28, 20]
    assert tokens(again) == [llama.greedy(prompt, 10) for prompt in prompts(30, 23)]


def test_the_end_token_ends_a_text(tiny_llama: Any, serve: Serve, prompts: Prompts) -> None:
    llama = tiny_llama(2)
    expected = llama.greedy(prompts(9)[0], 10)
    stop = expected[4]
    params = replace(GREEDY, stop_token_ids=[stop])
    (output,) = run(serve(llama.folder), prompts(9), params)
    assert output.outputs[0].token_ids == expected[: expected.index(stop) + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_min_tokens_keeps_the_end_token_away(tiny_llama: Any, serve: Serve, prompts: Prompts) -> None:
    params = SamplingParams(temperature=0, min_tokens=6, max_tokens=9, logit_bias={2: 100.0})
    (output,) = run(serve(tiny_llama(2).folder), prompts(9), params)
    assert output.outputs[0].token_ids.index(2) == 6
    assert output.outputs[0].finish_reason == "stop"


def test_generation_config_names_the_end_tokens(tiny_llama: Any, serve: Serve, prompts: Prompts, tmp_path: Any) -> None:
    import shutil

    llama = tiny_llama(2)
    shutil.copytree(llama.folder, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (output,) = run(serve(tmp_path / "copy"), prompts(9), SamplingParams(temperature=0, logit_bias={5: 100.0}))
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([5], "stop")


def test_a_seed_gives_the_same_tokens_in_any_company(tiny_llama: Any, serve: Serve, prompts: Prompts) -> None:
    llm = serve(tiny_llama(2).folder)
    seeded = SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    (prompt,) = prompts(9)
    alone = tokens(run(llm, [prompt], seeded))
    company = [GREEDY, SamplingParams(seed=6, top_k=5), seeded, SamplingParams(top_p=0.5)]
    assert tokens(run(llm, [*prompts(20, 3), prompt, *prompts(8)], company))[2:3] == alone
    crowded = serve(tiny_llama(2).folder, num_blocks=16, max_num_batched_tokens=5, enable_prefix_caching=False)
    assert tokens(run(crowded, [*prompts(20, 3), prompt, *prompts(8)], company))[2:3] == alone


def test_several_samples_differ_and_repeat(tiny_llama: Any, serve: Serve, prompts: Prompts) -> None:
    llm = serve(tiny_llama(2).folder)
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=8, ignore_eos=True)
    (first,), (second,) = run(llm, prompts(9), params), run(llm, prompts(9), params)
    samples = [sample.token_ids for sample in first.outputs]
    assert [sample.index for sample in first.outputs] == [0, 1, 2]
    assert len({tuple(sample) for sample in samples}) == 3
    assert [sample.token_ids for sample in second.outputs] == samples


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 4}, {"num_blocks": 16}])
def test_logprobs_are_those_of_a_full_forward(
    tiny_llama: Any, serve: Serve, prompts: Prompts, options: dict[str, Any]
) -> None:
    llama = tiny_llama(2)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    outputs = run(serve(llama.folder, **options), prompts(30, 30, 9), params)
    for output in outputs:
        (sample,) = output.outputs
        expected = torch.log_softmax(llama.logits([*output.prompt_token_ids, *sample.token_ids]), -1)
        prompt_length = len(output.prompt_token_ids)
        assert output.prompt_logprobs is not None
        assert sample.logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == prompt_length
        found = [*output.prompt_logprobs[1:], *sample.logprobs]
        for row, entry in zip(expected[:-1], found, strict=True):
            assert entry is not None
            for token, logprob in entry.items():
                assert logprob.logprob == pytest.approx(row[token].item(), abs=1e-4)
                assert logprob.rank == int((row > row[token]).sum()) + 1
        assert all(len(entry) == 3 for entry in sample.logprobs)
        assert sample.cumulative_logprob == pytest.approx(
            sum(entry[token].logprob for entry, token in zip(sample.logprobs, sample.token_ids, strict=True))
        )


def test_stream_gives_each_token_once(tiny_llama: Any, serve: Serve, prompts: Prompts) -> None:
    llama = tiny_llama(2)
    llm = serve(llama.folder)
    pieces = list(llm.stream({"prompt_token_ids": prompts(9)[0]}, GREEDY))
    assert [token for piece in pieces for token in piece.outputs[0].token_ids] == llama.greedy(prompts(9)[0], 10)
    assert [piece.finished for piece in pieces] == [False] * 9 + [True]


def test_a_stream_that_is_left_frees_its_blocks(tiny_llama: Any, serve: Serve, prompts: Prompts) -> None:
    llm = serve(tiny_llama(2).folder)
    stream = llm.stream({"prompt_token_ids": prompts(9)[0]}, GREEDY)
    next(stream)
    stream.close()
    assert not llm.llm_engine.has_unfinished_requests()
    assert llm.llm_engine.block_manager.num_free_blocks == 64


def test_abort_returns_what_there_is(tiny_llama: Any, serve: Serve, prompts: Prompts) -> None:
    engine = serve(tiny_llama(2).folder).llm_engine
    engine.add_request("a", prompts(9)[0], GREEDY)
    engine.add_request("b", prompts(9)[0], GREEDY)
    engine.step()
    aborted = engine.abort_request("a")
    assert aborted is not None
    assert (aborted.outputs[0].finish_reason, len(aborted.outputs[0].token_ids)) == ("abort", 1)
    assert engine.abort_request("a") is None
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert outputs[0].request_id == "b"


def test_metrics_are_in_order(tiny_llama: Any, serve: Serve, prompts: Prompts) -> None:
    (output,) = run(serve(tiny_llama(2).folder), prompts(9))
    metrics = output.metrics
    assert metrics is not None
    times = (metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time)
    assert None not in times
    assert list(times) == sorted(times)  # type: ignore[type-var]


def test_int8_answers_nearly_alike(tiny_llama: Any, serve: Serve, prompts: Prompts) -> None:
    params = replace(GREEDY, logprobs=0, max_tokens=1)
    exact, rounded = (
        run(serve(tiny_llama(2).folder, quantization=name), prompts(9), params)[0].outputs[0] for name in (None, "int8")
    )
    assert rounded.cumulative_logprob == pytest.approx(exact.cumulative_logprob, abs=0.5)


def test_dummy_weights_need_no_checkpoint(tiny_llama: Any, serve: Serve, prompts: Prompts) -> None:
    llm = serve(tiny_llama(2).folder, load_format="dummy", dtype="bfloat16", num_blocks=None, max_model_len=None)
    assert llm.llm_engine.config.max_model_len == 128
    assert len(tokens(run(llm, prompts(9)))[0]) == 10


def test_loading_reports_its_progress(tiny_llama: Any, serve: Serve) -> None:
    seen: list[tuple[int, int]] = []
    folder = tiny_llama(2).folder
    serve(folder, load_progress=lambda done, total: seen.append((done, total)))
    size = (folder / "model.safetensors").stat().st_size
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)
