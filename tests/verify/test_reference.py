"""The original as the verifier runs it."""

from pathlib import Path

import pytest
import torch

from porter.verify import reference
from porter.verify.compare import relative_error
from porter.verify.reference import _class_for, full_logits, load_reference
from porter.verify.tiny import shrink, tiny_config, write_checkpoint


def eager_against_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """How far eager attention is from the attention that the verifier takes."""
    ids = list(range(3, 35))
    chosen = full_logits(load_reference(folder, torch.float32, False), ids)
    monkeypatch.setattr(reference, "_ATTENTION", {})
    return relative_error(full_logits(load_reference(folder, torch.float32, False), ids), chosen)


def test_falcon_with_alibi_is_not_run_in_eager_attention_which_adds_it_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails once transformers is right: the exception can go then."""
    write_checkpoint(shrink(tiny_config("falcon"), alibi=True), tmp_path)
    assert eager_against_chosen(tmp_path, monkeypatch) > 1e-3


def test_falcon_without_alibi_is_the_same_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tiny_config("falcon"), tmp_path)
    assert eager_against_chosen(tmp_path, monkeypatch) < 1e-5


@pytest.mark.parametrize(("model_type", "kind"), [("emu3_text_model", "Emu3ForCausalLM"), ("llama", "Auto")])
def test_a_config_that_no_auto_class_knows_names_its_own(model_type: str, kind: str) -> None:
    """The text config of a larger model is saved with its language model, and no auto class takes it back."""
    config = tiny_config(model_type)
    config.architectures = ["Emu3ForCausalLM"]
    assert _class_for(config).__name__.startswith(kind)
