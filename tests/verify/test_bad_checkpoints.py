"""A checkpoint that is damaged is a wrong input (exit 2); one that doesn't fit its port is a failed check (exit 1)."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from porter.cli import app
from porter.verify.tiny import tiny_config, write_checkpoint

PORT = Path(__file__).parents[1] / "models" / "handwritten_llama.py"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tiny_config("llama"), tmp_path)
    return tmp_path


def run_verify(folder: Path) -> Result:
    return CliRunner().invoke(app, ["verify", "--port", str(PORT), "--model", str(folder)])


def edit_weights(folder: Path, edit: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda weights: weights.__delitem__(Q_PROJ), "qkv_proj.weight[q] is filled by no tensor"),
        (lambda weights: weights.update(stray=torch.zeros(3)), "stray unexpected"),
        (lambda weights: weights.update({Q_PROJ: torch.zeros(3, 4)}), "mis-shaped"),
    ],
    ids=["missing", "extra", "mis-shaped"],
)
def test_a_tensor_that_does_not_fit_fails_the_ledger(
    checkpoint: Path, edit: Callable[[Weights], object], told: str
) -> None:
    edit_weights(checkpoint, edit)
    result = run_verify(checkpoint)
    assert result.exit_code == 1
    failure = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "ledger failed" in failure
    assert told in failure


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def forget_model_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_off, "not a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors file"),
        (break_config, "config"),
        (forget_model_type, "config"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    ],
    ids=["cut off", "no weights", "broken config", "no model type", "no config"],
)
def test_a_damaged_checkpoint_is_one_line_and_exit_2(
    checkpoint: Path, damage: Callable[[Path], object], told: str
) -> None:
    damage(checkpoint)
    result = run_verify(checkpoint)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert told in result.stderr
