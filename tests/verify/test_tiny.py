"""Tiny random checkpoints: small, of every structure, and hard enough to be worth comparing."""

from pathlib import Path

import pytest
import torch

from porter.errors import SourceError
from porter.verify.reference import full_logits, load_reference
from porter.verify.tiny import WINDOW, model_type_of, shrink, tiny_config, write_checkpoint
from porter.verify.variants import variants

INSTALLED = ("opt", "llama", "gpt2", "gpt_neox", "bloom", "qwen2", "qwen3", "gemma2", "mistral", "mixtral")
MORE = ("falcon", "gemma3_text", "deepseek_v3", "gpt_oss", "phi3", "cohere", "stablelm", "gptj")


@pytest.mark.parametrize("model_type", [*INSTALLED, *MORE])
def test_a_checkpoint_is_tiny_and_its_logits_are_spread(model_type: str, tmp_path: Path) -> None:
    write_checkpoint(tiny_config(model_type), tmp_path)
    model = load_reference(tmp_path, torch.float32, False)
    assert sum(parameter.numel() for parameter in model.parameters()) < 300_000
    logits = full_logits(model, list(range(3, 35)))
    assert 1 < float(logits.std(-1).mean()) < 6
    assert len(set(logits.argmax(-1).tolist())) > 3


def test_every_kind_of_layer_appears_once() -> None:
    config = tiny_config("gemma2")
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert (config.num_hidden_layers, config.sliding_window) == (2, WINDOW)


def test_nothing_is_left_at_its_initial_value(tmp_path: Path) -> None:
    write_checkpoint(tiny_config("gpt2"), tmp_path)
    state = load_reference(tmp_path, torch.float32, False).state_dict()
    assert [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.std() == 0] == []


def test_the_same_seed_gives_the_same_checkpoint(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_checkpoint(tiny_config("opt"), tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_nested_sizes_are_shrunk() -> None:
    config = tiny_config("gemma3")
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (64, 2)


def test_unknown_names_are_one_line() -> None:
    with pytest.raises(SourceError, match="unknown model type"):
        tiny_config("no_such_model")
    with pytest.raises(SourceError, match="--trust-remote-code"):
        model_type_of("NoSuchForCausalLM")


def test_variants_come_from_the_fields_that_port_or_original_read(tmp_path: Path) -> None:
    port = tmp_path / "port.py"
    port.write_text("def build(config):\n    return config.tie_word_embeddings\n")
    found = [variant.name for variant in variants(tiny_config("falcon"), port)]
    assert found[:2] == ["default", "faint"]
    assert {"alibi=True", "bias=True", "parallel_attn=False", "tie_word_embeddings=False"} <= set(found)


def test_faint_weights_make_the_eps_of_norms_matter() -> None:
    config = tiny_config("llama")
    faint = next(each for each in variants(config, Path(__file__)) if each.name == "faint")
    assert faint.gain < 0.1
    assert faint.overrides == {"rms_norm_eps": 3 * config.rms_norm_eps}


def test_a_flag_brings_what_it_needs(tmp_path: Path) -> None:
    port = tmp_path / "port.py"
    port.write_text("config.use_sliding_window\n")
    variant = {each.name: each for each in variants(tiny_config("qwen2"), port)}["use_sliding_window=True"]
    assert shrink(tiny_config("qwen2"), **variant.overrides).layer_types == ["full_attention", "sliding_attention"]


def test_fields_that_only_another_release_reads_are_no_variants(tmp_path: Path) -> None:
    port = tmp_path / "port.py"
    port.write_text("")
    config = tiny_config("llama")
    ours, others = ({v.name for v in variants(config, port, same_release=same)} for same in (True, False))
    assert "attention_bias=True" in ours - others


def test_every_factor_is_tried_with_another_value_too(tmp_path: Path) -> None:
    port = tmp_path / "port.py"
    port.write_text(
        "config.embedding_multiplier, config.attention_dropout, config.rms_norm_eps, config.rope_parameters\n"
    )
    config = tiny_config("granite")
    others = next(v for v in variants(config, port, same_release=False) if v.name == "other factors").overrides
    assert set(others) == {"embedding_multiplier", "rope_parameters"}
    assert others["embedding_multiplier"] != config.embedding_multiplier
    assert others["rope_parameters"]["rope_theta"] != config.rope_parameters["rope_theta"]
