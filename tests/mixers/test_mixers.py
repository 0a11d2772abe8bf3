"""Layers with states: what is folded, what is derived, what is refused, and that a port of one is right."""

import ast
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import libcst as cst
import pytest
import torch

from porter.convert import convert
from porter.errors import Refusal
from porter.mixers.apart import set_apart
from porter.mixers.fold import fold
from porter.runtime.model_registry import load_port
from porter.source import load
from porter.verify.port_run import load_port_weights, new_port, port_logits
from porter.verify.schedule import schedules

LAUREL = Path(__file__).parents[1] / "models" / "laurel"
MODELING = (LAUREL / "modeling_laurel.py").read_text(encoding="utf-8")


def folded(body: str, known: dict[str, str]) -> str:
    function = cst.parse_statement(f"def f(x, mask, states):\n{body}")
    assert isinstance(function, cst.FunctionDef)
    text = cst.Module([fold(function, known, frozenset({"states"}))]).code
    return text.partition("\n")[2]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("    if mask is not None:\n        x = x * mask\n    return x\n", "    return x\n"),
        ("    if states is None and x:\n        x = 1\n    return x\n", "    return x\n"),
        (
            "    if self.training and x:\n        x = 1\n    else:\n        x = 2\n    return x\n",
            "    x = 2\n    return x\n",
        ),
        ("    on = states is not None\n    return x if on else mask\n", "    return x\n"),
        ("    if x and not self.training:\n        x = 1\n    return x\n", "    if x:\n        x = 1\n    return x\n"),
        (
            "    if x:\n        y = 1\n    elif mask is not None:\n        y = 2\n    else:\n        y = 3\n"
            "    return y\n",
            "    if x:\n        y = 1\n    else:\n        y = 3\n    return y\n",
        ),
        (
            "    if (\n        x\n        and x.y\n        and not mask\n    ):\n        x = 1\n",
            "    if (\n        x\n        and x.y):\n        x = 1\n",
        ),
        ("    if x and mask is not None:\n        x = mask()\n    return x\n", "    return x\n"),
        (
            "    if x:\n        from a import y\n    else:\n        y = None\n    return y is not None\n",
            "    if x:\n        from a import y\n    else:\n        y = None\n    return y is not None\n",
        ),
        (
            "    y = None\n    y = x.mask\n    return g(mask=y)\n",
            "    y = None\n    y = x.mask\n    return g(mask=y)\n",
        ),
    ],
)
def test_what_fixed_values_decide_goes(before: str, after: str) -> None:
    found = folded(before, {"mask": "None", "self.training": "False"})
    assert ast.dump(ast.parse(dedent(found))) == ast.dump(ast.parse(dedent(after)))


def test_a_comparison_that_is_known_goes() -> None:
    found = folded("    if x and x == 1:\n        x = states.old\n    return x\n", {"x == 1": "False"})
    assert dedent(found).strip() == "return x"


def apart(text: str) -> Any:
    return set_apart(cst.parse_module(text))[1].bodies["LaurelMixer"]


def test_a_forward_that_starts_from_its_state_resumes() -> None:
    assert "resumes = True" in cst.Module([apart(MODELING).definition]).code


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("initial_state=before", "initial_state=None"),  # the state that a longer forward ignores
        (
            "                projected = cache_params.update_conv_state(",
            "                cache_params.update_conv_state(",
        ),
    ],
)
def test_a_forward_that_ignores_its_state_does_not(before: str, after: str) -> None:
    assert before in MODELING
    assert "resumes" not in cst.Module([apart(MODELING.replace(before, after)).definition]).code


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("recurrent_states[0] if has_state", "old_states[0] if has_state", "no such thing"),
        (
            "attention_mask=attention_mask)\n        else:",
            "attention_mask=hidden_states)\n        else:",
            "hidden states only",
        ),
        ("        self.in_proj = nn.Linear", "        unused = nn.Linear", "sets it"),
        ("class LaurelMixer(nn.Module)", "class LaurelMixer(LaurelMLP)", "not updated by its own forward"),
    ],
)
def test_states_that_the_runtime_does_not_have_are_refused(tmp_path: Path, before: str, after: str, told: str) -> None:
    assert before in MODELING
    file = tmp_path / "modeling_laurel.py"
    file.write_text(MODELING.replace(before, after), encoding="utf-8")
    with pytest.raises(Refusal, match=told) as refused:
        convert(load(str(file)))
    assert refused.value.code == "P203"
    assert refused.value.line > 1


def test_a_port_with_states_gives_the_logits_of_its_original(tiny_model: Callable[[str], Any], tmp_path: Path) -> None:
    model = tiny_model("laurel").build()
    model.save_pretrained(tmp_path)
    port_file = tmp_path / "laurel.py"
    port_file.write_text(convert(load(str(LAUREL))).code, encoding="utf-8")
    port = load_port_weights(new_port(load_port(port_file), model.config, torch.float32), tmp_path)
    prompts = [torch.randint(3, 320, (length,)).tolist() for length in (1, 9, 23, 40)]
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in prompts])
    for name, steps in schedules(prompts, keeps_states=True).items():
        torch.testing.assert_close(
            port_logits(port, prompts, torch.float32, steps), expected, atol=2e-4, rtol=1e-4, msg=name
        )
