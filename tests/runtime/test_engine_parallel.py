"""Tensor parallel over processes: same tokens, clean ends, a dead rank is one clear error."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from porter.runtime.engine import LLM, SamplingParams
from porter.runtime.errors import WeightError, WorkerError

ROOT = Path(__file__).parents[2]
PORT = ROOT / "tests" / "models" / "handwritten_llama.py"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

SCRIPT = """
import sys
from porter.runtime.engine import LLM, SamplingParams

def main():
    options = {"device": "cpu", "skip_tokenizer_init": True, "num_blocks": 32, "max_model_len": 128}
    llm = LLM(sys.argv[1], port=sys.argv[2], tensor_parallel_size=2, **options)
    output = llm.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(temperature=0, ignore_eos=True, max_tokens=4))
    print(output[0].outputs[0].token_ids)

if __name__ == "__main__":
    main()
"""


def workers() -> list[Any]:
    return list(multiprocessing.active_children())


def tokens(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("num_kv_heads", [2, 1], ids=["kv heads split", "kv heads replicated"])
def test_two_ranks_give_the_tokens_of_one(
    tiny_llama: Any, serve: Callable[..., LLM], prompts: Callable[..., list[list[int]]], num_kv_heads: int
) -> None:
    llama = tiny_llama(num_kv_heads)
    llm = serve(llama.folder, tensor_parallel_size=2, num_blocks=20, max_num_batched_tokens=11)
    lengths = (1, 5, 30)
    assert tokens(llm, prompts(*lengths)) == [llama.greedy(prompt, 8) for prompt in prompts(*lengths)]
    llm.shutdown()
    assert workers() == []
    with pytest.raises(WorkerError, match="shut down"):
        tokens(llm, prompts(1))


def test_a_dead_rank_is_one_error_and_leaves_nothing(
    tiny_llama: Any, serve: Callable[..., LLM], prompts: Callable[..., list[list[int]]]
) -> None:
    llm = serve(tiny_llama(2).folder, tensor_parallel_size=2)
    llm.llm_engine.add_request("a", prompts(5)[0], GREEDY)
    llm.llm_engine.step()
    (worker,) = workers()
    worker.kill()
    start = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 failed"):
        llm.llm_engine.step()
    with pytest.raises(WorkerError, match="rank 1 failed"):
        llm.llm_engine.step()
    assert time.monotonic() - start < 20
    assert workers() == []


def test_a_failing_start_stops_the_other_ranks(tiny_llama: Any, serve: Callable[..., LLM], tmp_path: Path) -> None:
    shutil.copytree(tiny_llama(2).folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(WeightError, match="damaged"):
        serve(tmp_path / "copy", tensor_parallel_size=2)
    assert workers() == []


def test_a_guarded_script_works_and_ends(tiny_llama: Any, tmp_path: Path) -> None:
    llama = tiny_llama(2)
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(llama.folder), str(PORT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == str(llama.greedy([5, 6, 7], 4))
