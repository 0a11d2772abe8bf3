"""What a port needs of a checkpoint is remembered, for just that port and config."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from porter.cli import app
from porter.manifest import write_port
from porter.needs import Needs, needs_of, remembered
from porter.runtime.checkpoint import load_config
from porter.runtime.model_registry import load_port
from porter.verify.tiny import tiny_config, write_checkpoint
from porter.weights import checkpoint_ledger, outline

PORT = Path(__file__).parent / "models" / "handwritten_llama.py"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tiny_config("llama"), tmp_path / "tiny")
    return tmp_path / "tiny"


def test_needs_are_the_same_after_json(tmp_path: Path) -> None:
    from porter.convert import convert
    from porter.source import load

    made = convert(load("mixtral"))  # experts: shard ids of two parts
    port = load_port(write_port(tmp_path / "port", made.code, made.manifest).path)
    needs = needs_of(port, tiny_config("mixtral"))
    assert any(isinstance(key, tuple) for info in needs.index.parameters.values() for key in info.parts)
    assert remembered([b"key"], lambda: needs) == needs
    assert remembered([b"key"], pytest.fail) == needs


def test_another_port_or_config_is_built_again(checkpoint: Path, tmp_path: Path) -> None:
    port = tmp_path / "port.py"
    port.write_text(PORT.read_text())
    assert checkpoint_ledger(outline(str(checkpoint)), port)[1].complete
    port.write_text(PORT.read_text().replace("self.norm = RMSNorm(", "self.nrm = RMSNorm("))
    assert "model.nrm.weight" in checkpoint_ledger(outline(str(checkpoint)), port)[1].unfilled
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 131', '"vocab_size": 130'))
    assert any("embed_tokens" in each for each in checkpoint_ledger(outline(str(checkpoint)), port)[1].problems)


def test_a_damaged_memory_is_made_again(checkpoint: Path, cache: Path) -> None:
    needs = needs_of(load_port(PORT), load_config(checkpoint))
    assert remembered([b"key"], lambda: needs) == needs
    for file in (cache / "porter" / "needs").iterdir():
        file.write_text(file.read_text()[:99])
    made: list[Needs] = []

    def make() -> Needs:
        made.append(needs)
        return needs

    assert remembered([b"key"], make) == needs
    assert made == [needs]


def test_the_second_ledger_of_a_checkpoint_imports_no_torch(checkpoint: Path, cache: Path) -> None:
    asked = ["ledger", "--model", str(checkpoint)]
    first = CliRunner().invoke(app, asked)
    script = "import sys; from porter.cli import app\ntry: app(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", script, *asked]
    # the names under which the environment finds the user's cache differ by system
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HOME": str(cache), "COLUMNS": "80"}
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == first.exit_code == 0
    assert second.stdout == first.stdout + "False\n"
