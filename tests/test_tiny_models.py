"""The tiny models are fit to be converted: all parse, and those in today's idiom run as decoders do."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

MODELS = Path(__file__).parent / "models"
MODERN = ("acorn", "birch", "cedar", "laurel")
OLD_STYLE = ("dogwood", "elm", "fir", "ginkgo", "hazel", "juniper")


@pytest.mark.parametrize("name", MODERN)
def test_decoding_with_a_cache_gives_the_logits_of_the_whole(name: str, tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model(name).build()
    ids = torch.randint(3, model.config.vocab_size, (1, 40))
    with torch.no_grad():
        whole = model(ids).logits
        past = model(ids[:, :25], use_cache=True).past_key_values
        rest = model(ids[:, 25:], past_key_values=past).logits
    torch.testing.assert_close(rest, whole[:, 25:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODERN)
def test_a_checkpoint_survives_saving(name: str, tiny_model: Callable[[str], Any], tmp_path: Path) -> None:
    tiny = tiny_model(name)
    model = tiny.build()
    model.save_pretrained(tmp_path)
    loaded = tiny.model_class.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = torch.randint(3, model.config.vocab_size, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", MODERN + OLD_STYLE)
def test_the_file_defines_one_causal_language_model(name: str) -> None:
    tree = ast.parse((MODELS / name / f"modeling_{name}.py").read_text(encoding="utf-8"))
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len([c for c in classes if c.endswith(("ForCausalLM", "LMHeadModel"))]) == 1


@pytest.mark.parametrize("name", ["rowan", "willow"])
def test_a_broken_file_does_not_parse(name: str) -> None:
    text = (MODELS / "bad" / f"modeling_{name}.py").read_text(encoding="utf-8")
    with pytest.raises(SyntaxError):
        ast.parse(text)
