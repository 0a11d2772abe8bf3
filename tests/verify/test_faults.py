"""Seeded faults in a port that is right: each is caught by the check that should, at the module that is wrong."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from porter.runtime.model_registry import load_port
from porter.verify.checks import generation, ledger, logits, matrix, modules, parallel
from porter.verify.prompts import random_prompts
from porter.verify.subject import Subject
from porter.verify.tiny import shrink, tiny_config, write_checkpoint

PORT = Path(__file__).parents[1] / "models" / "handwritten_llama.py"
LAYER = "model.layers.0"


@dataclass(frozen=True)
class Fault:
    """One edit of the port, the module that must be named as wrong by itself, and a word of the suggested cause."""

    name: str
    before: str
    after: str
    module: str
    cause: str
    config: dict[str, Any] = field(default_factory=dict)


FAULTS = [
    Fault(
        "swapped gate and up",
        '{"gate_proj": 0, "up_proj": 1}',
        '{"gate_proj": 1, "up_proj": 0}',
        f"{LAYER}.mlp.gate_up_proj",
        "exchanged",
    ),
    Fault(
        "swapped k and v",
        '"k_proj": "k", "v_proj": "v"',
        '"k_proj": "v", "v_proj": "k"',
        f"{LAYER}.self_attn.qkv_proj",
        "another order",
    ),
    Fault(
        "wrong theta",
        "get_rope_parameters(config)",
        '{**get_rope_parameters(config), "rope_theta": 2000.0}',
        f"{LAYER}.self_attn",
        "rotary",
    ),
    Fault("lost scale", "head_dim**-0.5", "1.0", f"{LAYER}.self_attn", "scale"),
    Fault(
        "a window that the model has not",
        "max_position=",
        "sliding_window=6, max_position=",
        f"{LAYER}.self_attn",
        "the sliding window is 6, the original's None",
    ),
    Fault(
        "lost rotation of v's sign",
        "(positions, query, key, value,",
        "(positions, query, key, -value,",
        f"{LAYER}.self_attn",
        "-1 times",
    ),
    Fault("wrong eps", "eps=config.rms_norm_eps", "eps=0.5", f"{LAYER}.input_layernorm", "eps"),
    Fault("wrong activation", "config.hidden_act", '"gelu"', f"{LAYER}.mlp", "activation"),
    Fault("lost residual", "return hidden_states + self.mlp", "return self.mlp", LAYER, "residual"),
    Fault("lost final norm", "return self.norm(hidden_states)", "return hidden_states", "model", "norm"),
    Fault(
        "lost embedding multiplier",
        "hidden_states = self.embed_tokens(input_ids)",
        "hidden_states = self.embed_tokens(input_ids + 1 - 1 * (input_ids > 64))",
        "model.embed_tokens",
        "rows of the embedding",
    ),
    Fault(
        "bias added to nothing",
        "return self.down_proj(self.act_fn",
        "return 0.01 + self.down_proj(self.act_fn",
        f"{LAYER}.mlp",
        "bias",
    ),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_checkpoint(shrink(tiny_config("llama"), num_key_value_heads=4), folder)
    return folder


def subject_of(checkpoint: Path, folder: Path, before: str = "", after: str = "") -> Subject:
    """The hand-written port with one text replaced, against a checkpoint."""
    text = PORT.read_text()
    assert before in text
    port = folder / "port.py"
    port.write_text(text.replace(before, after) if before else text)
    from porter.runtime.checkpoint import load_config

    config = load_config(checkpoint)
    return Subject(checkpoint, port, load_port(port), config, "float32", random_prompts(config))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_wrong_module_is_named(fault: Fault, checkpoint: Path, tmp_path: Path) -> None:
    check = modules.check(subject_of(checkpoint, tmp_path, fault.before, fault.after))
    assert check.status == "FAIL"
    assert check.data["culprit"] == fault.module
    assert fault.cause in check.detail.partition("look at: ")[2]


def test_the_port_as_written_passes(checkpoint: Path, tmp_path: Path) -> None:
    subject = subject_of(checkpoint, tmp_path)
    checks = [each.check(subject) for each in (ledger, modules, logits, matrix, generation)]
    assert [check.status for check in checks] == ["PASS"] * 5


def test_a_scaled_logit_is_caught_where_no_module_is_wrong(checkpoint: Path, tmp_path: Path) -> None:
    subject = subject_of(
        checkpoint, tmp_path, "return self.lm_head(hidden_states)", "return 0.9 * self.lm_head(hidden_states)"
    )
    assert modules.check(subject).status == "PASS"
    assert logits.check(subject).status == "FAIL"


def test_not_a_number_never_passes(checkpoint: Path, tmp_path: Path) -> None:
    subject = subject_of(
        checkpoint, tmp_path, "return self.lm_head(hidden_states)", "return float('nan') * self.lm_head(hidden_states)"
    )
    assert logits.check(subject).status == "FAIL"
    subject = subject_of(
        checkpoint, tmp_path, "return self.norm(hidden_states)", "return float('nan') * self.norm(hidden_states)"
    )
    assert modules.check(subject).status == "FAIL"


def test_a_lost_bias_is_caught_by_the_ledger(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_checkpoint(shrink(tiny_config("llama"), attention_bias=True), folder)
    check = ledger.check(subject_of(folder, tmp_path, "bias=config.attention_bias", "bias=False"))
    assert check.status == "FAIL"
    assert "self_attn.q_proj.bias unexpected" in " ".join(check.data["problems"])


def test_a_fault_in_decode_only_is_caught_where_single_tokens_are_computed(checkpoint: Path, tmp_path: Path) -> None:
    subject = subject_of(
        checkpoint, tmp_path, "self.attn(positions,", "self.attn(positions * (attn_metadata.max_seqlen_q > 1),"
    )
    assert modules.check(subject).status == "PASS"
    check = matrix.check(subject)
    assert (check.status, check.detail.startswith("decode: ")) == ("FAIL", True)
    assert check.data["culprit"] == f"{LAYER}.self_attn"
    check = generation.check(subject)
    assert (check.status, "decode" in check.detail) == ("FAIL", True)


def test_a_fault_in_chunks_only_is_caught_by_generation(checkpoint: Path, tmp_path: Path) -> None:
    subject = subject_of(
        checkpoint, tmp_path, "self.attn(positions,", "self.attn(positions + (len(positions) == 7) * (positions > 20),"
    )
    check = generation.check(subject)
    assert (check.status, "chunked prefill" in check.detail) == ("FAIL", True)


def test_one_cache_for_two_layers_is_named_with_both(checkpoint: Path, tmp_path: Path) -> None:
    before, after = "zip(self.layers, kv_caches, strict=True)", "zip(self.layers, kv_caches[:1] * 2, strict=True)"
    check = matrix.check(subject_of(checkpoint, tmp_path, before, after))
    assert (check.status, check.data["culprit"]) == ("FAIL", "model")
    assert "model.layers.0.self_attn.attn and model.layers.1.self_attn.attn" in check.detail


def test_a_fault_in_shards_only_is_caught_by_tensor_parallelism(checkpoint: Path, tmp_path: Path) -> None:
    subject = subject_of(
        checkpoint, tmp_path, "        return self.o_proj(", "        return self.qkv_proj.num_heads / 4 * self.o_proj("
    )
    assert modules.check(subject).status == "PASS"
    check = parallel.check(subject, 2)
    assert (check.status, check.data["culprit"]) == ("FAIL", f"{LAYER}.self_attn")


def test_a_size_that_does_not_divide_is_skipped_with_the_reason(checkpoint: Path, tmp_path: Path) -> None:
    check = parallel.check(subject_of(checkpoint, tmp_path), 3)
    assert (check.status, "does not divide" in check.detail) == ("skip", True)


def test_relative_errors_are_measured_by_token() -> None:
    from porter.verify.compare import token_errors

    theirs = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    assert token_errors(theirs + torch.tensor([[0.0, 0.5], [0.0, 0.0]]), theirs).tolist() == pytest.approx([0.1, 0.0])


def test_a_single_number_near_zero_is_measured_against_the_usual() -> None:
    from porter.verify.compare import token_errors

    gate = torch.tensor([[1.0], [-1.0], [1e-5]])
    assert token_errors(gate + 1e-6, gate).max() < 1e-5
    assert token_errors(gate + 1e-2, gate).min() > 1e-3
