"""An original that was recorded elsewhere stands in for one that runs here."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from porter.cli import app
from porter.errors import OriginalError, UsageError
from porter.runtime.checkpoint import load_config
from porter.runtime.model_registry import load_port
from porter.verify.checks import logits, modules
from porter.verify.recorded import Recorded, load_recorded, script
from porter.verify.request import Request
from porter.verify.subject import Subject
from porter.verify.tiny import shrink, tiny_config

HANDWRITTEN = Path(__file__).parents[1] / "models" / "handwritten_llama.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights and recording the script made in a process that knows nothing of porter."""
    place = tmp_path_factory.mktemp("recorded")
    config = shrink(tiny_config("llama"))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(place)
    (place / "record.py").write_text(script())
    arguments = [str(place), "--random", "--out", str(place / "run.safetensors")]
    subprocess.run([sys.executable, str(place / "record.py"), *arguments], check=True, cwd=place, capture_output=True)
    return place


@pytest.fixture
def subject(folder: Path) -> Subject:
    recorded = load_recorded(folder / "run.safetensors")
    config = load_config(folder)
    return Subject(folder, HANDWRITTEN, load_port(HANDWRITTEN), config, "float32", recorded.prompts, recorded=recorded)


def test_the_script_needs_torch_safetensors_and_transformers_alone() -> None:
    tree = ast.parse(script())
    imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    others = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert others == {"torch", "safetensors", "transformers"}


def test_a_right_port_agrees_with_the_recording(subject: Subject) -> None:
    found = modules.check(subject)
    assert (found.status, logits.check(subject).status) == ("PASS", "PASS")
    assert int(found.figure.split(" over ")[1]) > 20


def test_a_port_that_differs_from_the_recording_fails_and_the_module_is_named(subject: Subject) -> None:
    with torch.no_grad():
        subject.model.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(1.01)
    found = modules.check(subject)
    assert found.status == "FAIL"
    assert "wrong by itself" in found.detail
    assert "model.layers.1.mlp.down_proj" in found.detail


def test_logits_are_given_up_to_the_first_other_token(subject: Subject) -> None:
    recorded = subject.recorded
    assert isinstance(recorded, Recorded)
    same = tuple(recorded.new_tokens[0])
    other = (*same[:3], same[3] + 1, *same[4:])
    prompt = tuple(recorded.prompts[0])
    assert [len(recorded.logits_after(prompt, tokens)) for tokens in (same, other)] == [12, 4]


def test_another_recording_is_not_agreed_with(subject: Subject) -> None:
    run = subject.recorded.run  # type: ignore[union-attr]
    changed = replace(subject.recorded, run=replace(run, logits=run.logits.roll(1, dims=0)))  # type: ignore[type-var]
    assert logits.check(replace(subject, recorded=changed, _made={})).status == "FAIL"


def test_a_file_that_is_no_recording_is_one_line(tmp_path: Path, folder: Path) -> None:
    save_file({"logits": torch.zeros(1)}, tmp_path / "other.safetensors")
    for path in (tmp_path / "other.safetensors", tmp_path / "absent.safetensors", folder / "config.json"):
        with pytest.raises(OriginalError, match="no recording"):
            load_recorded(path)


def test_the_recording_holds_modules_in_the_order_in_which_they_returned(folder: Path) -> None:
    names = [call.module for call in load_recorded(folder / "run.safetensors").run.trace.calls]
    assert names.index("model.layers.0.self_attn.q_proj") < names.index("model.layers.0.self_attn")
    assert names[-1] == ""
    assert load_file(folder / "model.safetensors")["lm_head.weight"].std() > 0


def test_a_recording_goes_with_real_weights_in_float32() -> None:
    with pytest.raises(UsageError, match="--reference"):
        Request(subject="x.py", random=True, reference=Path("run.safetensors"))


def test_the_command_writes_the_script_and_keeps_another_file(tmp_path: Path) -> None:
    out = tmp_path / "record.py"
    assert CliRunner().invoke(app, ["reference", "--out", str(out)]).exit_code == 0
    assert out.read_text() == script()
    out.write_text(json.dumps({}))
    assert CliRunner().invoke(app, ["reference", "--out", str(out)]).exit_code == 2
    assert out.read_text() == "{}"
