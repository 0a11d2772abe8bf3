"""What can't be served is refused in one line that says what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from porter.runtime.checkpoint import INDEX, WEIGHTS, resolve_model
from porter.runtime.engine import LLM, SamplingParams
from porter.runtime.errors import ConfigError, EngineError, PortError, RequestError, WeightError

Serve = Callable[..., LLM]


@pytest.fixture
def folder(tiny_llama: Any, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_llama(2).folder, tmp_path / "copy"))


def refused(kind: type[EngineError], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("prompt", "params", "match"),
    [
        ([], {}, "empty"),
        ([5] * 64, {}, "64 tokens"),
        ([96], {}, "token id 96"),
        ([-1], {}, "token id -1"),
        ([5], {"logit_bias": {200: 1.0}}, "token id 200"),
        ([5], {"stop_token_ids": [96]}, "token id 96"),
        ([5], {"stop": "x"}, "tokenizer"),
    ],
)
def test_a_bad_request(tiny_llama: Any, serve: Serve, prompt: list[int], params: dict[str, Any], match: str) -> None:
    llm = serve(tiny_llama(2).folder)
    refused(RequestError, match, lambda: llm.generate({"prompt_token_ids": prompt}, SamplingParams(**params)))
    assert not llm.llm_engine.has_unfinished_requests()


def test_one_bad_prompt_leaves_no_other_behind(tiny_llama: Any, serve: Serve) -> None:
    llm = serve(tiny_llama(2).folder)
    refused(RequestError, "empty", lambda: llm.generate([{"prompt_token_ids": [5]}, {"prompt_token_ids": []}]))
    assert not llm.llm_engine.has_unfinished_requests()


def test_text_chat_and_counts(tiny_llama: Any, serve: Serve) -> None:
    llm = serve(tiny_llama(2).folder)
    refused(RequestError, "tokenizer", lambda: llm.generate("text"))
    refused(RequestError, "chat template", lambda: llm.chat([{"role": "user", "content": "x"}]))
    refused(RequestError, "1 prompts", lambda: llm.generate([{"prompt_token_ids": [5]}], [SamplingParams()] * 2))
    refused(RequestError, "not a prompt", lambda: llm.generate([{"tokens": [5]}]))  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "int4"}, "dtype"),
        ({"device": "abacus"}, "device"),
        ({"max_model_len": 4096}, "128 positions"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"num_blocks": 3}, "num_blocks"),
        ({"block_size": 0}, "block_size"),
        ({"max_num_seqs": -1}, "max_num_seqs"),
        ({"max_num_batched_tokens": 1.5}, "max_num_batched_tokens"),
        ({"quantization": "int3"}, "int3"),
        ({"load_format": "npz"}, "load_format"),
        ({"gpu_memory_utilization": 2}, "gpu_memory_utilization"),
    ],
)
def test_a_bad_option(tiny_llama: Any, serve: Serve, options: dict[str, Any], match: str) -> None:
    refused(ConfigError, match, lambda: serve(tiny_llama(2).folder, **options))


def test_an_unported_architecture(tiny_llama: Any, serve: Serve) -> None:
    refused(PortError, "no port for LlamaForCausalLM", lambda: serve(tiny_llama(2).folder, port=None))


def test_a_model_that_is_nowhere(serve: Serve, tmp_path: Path) -> None:
    refused(ConfigError, "not a folder", lambda: serve(tmp_path / "nothing"))
    refused(ConfigError, "config.json", lambda: serve(tmp_path))
    refused(ConfigError, "hub", lambda: resolve_model("nobody/no-such-model"))


def test_a_broken_config(folder: Path, serve: Serve) -> None:
    (folder / "config.json").write_text("{")
    refused(ConfigError, "config", lambda: serve(folder))


def test_a_broken_generation_config(folder: Path, serve: Serve) -> None:
    (folder / "generation_config.json").write_text("{")
    refused(ConfigError, "generation_config.json is not JSON", lambda: serve(folder))


def test_no_tokenizer(folder: Path, serve: Serve) -> None:
    refused(ConfigError, "skip_tokenizer_init", lambda: serve(folder, skip_tokenizer_init=False))


@pytest.mark.parametrize("keep", [0, 5, 100, -40])
def test_a_truncated_weight_file(folder: Path, serve: Serve, keep: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    refused(WeightError, "damaged", lambda: serve(folder))


def test_no_weight_file(folder: Path, serve: Serve) -> None:
    (folder / WEIGHTS).unlink()
    refused(WeightError, "no .safetensors", lambda: serve(folder))


def shard(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    halves = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for name, held in halves.items():
        save_file({key: tensors[key] for key in held}, folder / name)
    weight_map = {key: name for name, held in halves.items() for key in held}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_sharded_checkpoint_serves_like_a_single_file(tiny_llama: Any, folder: Path, serve: Serve) -> None:
    shard(folder)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    (output,) = serve(folder).generate({"prompt_token_ids": [5, 6]}, params, use_tqdm=False)
    assert output.outputs[0].token_ids == tiny_llama(2).greedy([5, 6], 5)


def test_a_missing_shard(folder: Path, serve: Serve) -> None:
    shard(folder)
    (folder / "b.safetensors").unlink()
    refused(WeightError, "lacks b.safetensors", lambda: serve(folder))


def test_a_broken_index(folder: Path, serve: Serve) -> None:
    (folder / INDEX).write_text("[]")
    refused(WeightError, "index", lambda: serve(folder))
