"""Which port a request is about; without one, a conversion for this run only."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import porter
from porter import registry
from porter.errors import PortError
from porter.manifest import file_sha256, read_port, write_port
from porter.verify.request import Request
from porter.verify.run import verify
from porter.verify.select import select_port
from porter.verify.tiny import tiny_config, write_checkpoint

HANDWRITTEN = Path(__file__).parents[1] / "models" / "handwritten_llama.py"
MANIFEST = {"architecture": "LlamaForCausalLM", "module": "llama.py"}


@dataclass(frozen=True)
class FakeConversion:
    code: str
    manifest: dict[str, Any]
    others: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the stand-in converter was asked to convert; it always gives the hand-written Llama."""
    asked: list[str] = []
    convert, source = ModuleType("porter.convert"), ModuleType("porter.source")
    manifest = {**MANIFEST, "module_sha256": file_sha256(HANDWRITTEN)}
    vars(source)["load"] = asked.append
    vars(convert)["convert"] = lambda source, target="native": FakeConversion(HANDWRITTEN.read_text(), manifest)
    for module in (convert, source):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(porter, module.__name__.split(".")[1], module, raising=False)
    return asked


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tiny_config("llama"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_model_without_a_port_is_converted_from_its_own_folder(loaded: list[str], checkpoint: Path) -> None:
    with select_port(Request(model=str(checkpoint))) as selected:
        assert (selected.converted, loaded) == (True, [str(checkpoint)])
        assert "converted for this run only" in selected.note
        folder = selected.port.folder
    assert not folder.exists()


def test_a_source_is_converted_even_if_its_architecture_is_registered(loaded: list[str], tmp_path: Path) -> None:
    code = HANDWRITTEN.read_text()
    registry.register(write_port(tmp_path / "p", code, {**MANIFEST, "module_sha256": file_sha256(HANDWRITTEN)}))
    with select_port(Request(subject="llama", random=True)) as selected:
        assert (selected.converted, loaded) == (True, ["llama"])


def test_a_conversion_for_one_run_passes_and_is_said_to_be_one(loaded: list[str], checkpoint: Path) -> None:
    result = verify(Request(subject="llama", model=str(checkpoint)))
    assert (result.passed, result.converted) == (True, True)


def test_a_module_without_manifest_is_taken_as_it_is(tmp_path: Path) -> None:
    with select_port(Request(port=HANDWRITTEN, random=True)) as selected:
        assert (selected.port.architecture, selected.recorded) == ("LlamaForCausalLM", False)


def test_a_file_without_a_port_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    with (
        pytest.raises(PortError, match="compute_logits"),
        select_port(Request(port=tmp_path / "empty.py", random=True)),
    ):
        pass


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PortError, match=r"port\.json"):
        read_port(tmp_path)
