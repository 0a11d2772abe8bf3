"""The modeling files of the installed transformers: each converts, builds, and finds a place for every tensor."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from porter.convert import Conversion, convert
from porter.errors import Refusal
from porter.manifest import write_port
from porter.runtime.model_registry import load_port
from porter.source import load
from porter.verify.tiny import shrink, tiny_config, write_checkpoint
from porter.weights import Ledger, make_ledger

TYPES = ("opt", "llama", "gpt2", "gpt_neox", "bloom", "qwen2", "qwen3", "gemma2", "mistral", "mixtral")
# Checkpoints of these hold q, k and v in one tensor, or weights the other way round.
FUSED = {
    "gpt2": {"c_attn": "contiguous"},
    "gpt_neox": {"query_key_value": "grouped"},
    "bloom": {"query_key_value": "grouped"},
}
GONE = (
    "dropout(",
    "dropout_p",
    "past_key_value",
    "use_cache",
    "attention_mask",
    "output_attentions",
    "labels",
    "kwargs",
    "gradient_checkpointing",
    "return_dict",
    "todo",
)
TRANSPOSED = {"gpt2": ("c_attn", "c_fc", "c_proj")}
LAYERS = {
    "opt": "PagedAttention",
    "gpt2": "PagedAttention",
    "bloom": "PagedAttentionWithALiBi",
    **dict.fromkeys(("llama", "gpt_neox", "qwen2", "qwen3", "gemma2", "mistral", "mixtral"), "PagedAttentionWithRoPE"),
}


@cache
def converted(model_type: str) -> Conversion:
    return convert(load(model_type))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("installed")


def port_of(model_type: str, folder: Path) -> Any:
    conversion = converted(model_type)
    return load_port(write_port(folder / model_type, conversion.code, conversion.manifest).path)


def ledger_of(model_type: str, folder: Path, **overrides: Any) -> Ledger:
    config = shrink(tiny_config(model_type), **overrides)
    checkpoint = folder / f"{model_type}-{len(overrides)}"
    write_checkpoint(config, checkpoint)
    return make_ledger(port_of(model_type, folder), config, checkpoint)


@pytest.mark.parametrize("model_type", TYPES)
def test_it_converts_to_python(model_type: str) -> None:
    compile(converted(model_type).code, f"{model_type}.py", "exec")


@pytest.mark.parametrize("model_type", TYPES)
def test_its_attention_is_of_the_right_kind(model_type: str) -> None:
    made = {
        line.split("(")[0].split()[-1] for line in converted(model_type).code.splitlines() if "= PagedAttention" in line
    }
    assert made == {LAYERS[model_type]}


@pytest.mark.parametrize("model_type", TYPES)
def test_nothing_of_training_caching_or_masking_is_left(model_type: str) -> None:
    code = converted(model_type).code.lower()
    assert [word for word in GONE if word in code] == []


@pytest.mark.parametrize("model_type", TYPES)
def test_fused_and_transposed_checkpoints_are_named(model_type: str) -> None:
    rules = converted(model_type).manifest["spec"]["weight_rules"]
    assert rules["fused"] == FUSED.get(model_type, {})
    assert tuple(rules["transposed"]) == TRANSPOSED.get(model_type, ())


@pytest.mark.parametrize("model_type", TYPES)
def test_every_tensor_of_a_checkpoint_has_one_place(model_type: str, folder: Path) -> None:
    assert ledger_of(model_type, folder).problems == ()


@pytest.mark.parametrize("model_type", ["opt", "llama", "gpt_neox", "qwen2"])
def test_a_checkpoint_with_an_untied_head_has_one_place_for_each_tensor(model_type: str, folder: Path) -> None:
    assert ledger_of(model_type, folder, tie_word_embeddings=False).problems == ()


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 32}),
        ("opt", {"enable_bias": False}),
        ("gpt_neox", {"attention_bias": False}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_the_config_chooses_stays_a_choice_of_the_port(
    model_type: str, fields: dict[str, Any], folder: Path
) -> None:
    ledger = ledger_of(model_type, folder / "-".join(fields), **fields)
    assert ledger.problems == ()


def test_a_port_says_what_its_config_must_be() -> None:
    assert 'requires = {"add_cross_attention": False}' in converted("gpt2").code
    assert "requires" not in converted("llama").code


@pytest.mark.parametrize(
    ("model_type", "told"),
    [
        ("reformer", "LSH attention"),
        ("prophetnet", "n-gram streams"),
        ("cpmant", "learned prompts"),
        ("axk2", "an indexer"),
        ("rwkv", "a recurrence over positions"),
        ("gemma4_assistant", "shared_kv_states is None"),
    ],
)
def test_what_no_paged_cache_serves_is_refused_by_its_kind(model_type: str, told: str) -> None:
    with pytest.raises(Refusal, match=told) as refused:
        convert(load(model_type))
    assert refused.value.line > 1


def test_a_clamp_between_a_fused_projection_and_its_split_stays() -> None:
    code = converted("mpt").code
    assert (
        code.index("self.Wqkv(")
        < code.index(".clamp(")
        < code.index(".chunk(3, dim=-1)")
        < code.index("self.attn(query")
    )
