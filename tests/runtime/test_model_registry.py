"""Ports are found in order: registered, stored, entry points; a file loads as it is now."""

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from torch import nn

from porter.runtime import model_registry
from porter.runtime.errors import PortError
from porter.runtime.model_registry import ModelRegistry, load_port, port_reference

PORT = """
from torch import nn

class Other(nn.Module):
    def compute_logits(self, hidden): return hidden

class {name}(nn.Module):
    value = {value}
    def compute_logits(self, hidden): return hidden

class Helper(nn.Module):
    pass
"""


class Registered(nn.Module):
    def compute_logits(self) -> None: ...


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PORTER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(ModelRegistry, "_registered", {})
    return tmp_path / "home"


def write_port(folder: Path, name: str = "ToyForCausalLM", value: int = 1, manifest: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "toy.py"
    file.write_text(PORT.format(name=name, value=value))
    if manifest:
        (folder / "port.json").write_text(json.dumps({"architecture": name, "module": "toy.py"}))
    return file


def store(home: Path, port_id: str, value: int) -> None:
    write_port(home / "ports" / "ToyForCausalLM" / port_id, value=value, manifest=True)
    (home / "ports" / "ToyForCausalLM" / "current").write_text(port_id + "\n")


def test_a_registered_class_wins(home: Path) -> None:
    store(home, "a1", 1)
    ModelRegistry.register_model("ToyForCausalLM", Registered)
    assert ModelRegistry.resolve(["ToyForCausalLM"]) is Registered


def test_a_lazy_name_is_imported_when_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_port(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    ModelRegistry.register_model("ToyForCausalLM", "toy:Other")
    assert ModelRegistry.resolve(["ToyForCausalLM"]).__name__ == "Other"


def test_the_store_serves_the_current_port(home: Path) -> None:
    store(home, "a1", 1)
    store(home, "b2", 2)
    assert ModelRegistry.resolve(["ToyForCausalLM"]).value == 2  # type: ignore[attr-defined]


def test_an_entry_point_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_port(tmp_path, value=3)
    found = EntryPoint("ToyForCausalLM", f"{file}:ToyForCausalLM", "porter.models")
    monkeypatch.setattr(model_registry, "entry_points", lambda group, name: [found])
    assert ModelRegistry.resolve(["ToyForCausalLM"]).value == 3  # type: ignore[attr-defined]


def test_an_unknown_architecture_says_what_to_do() -> None:
    with pytest.raises(PortError, match="porter convert"):
        ModelRegistry.resolve(["NopeForCausalLM"])


def test_the_last_class_with_compute_logits_is_the_port(tmp_path: Path) -> None:
    assert load_port(write_port(tmp_path)).__name__ == "ToyForCausalLM"


def test_the_manifest_names_the_class(tmp_path: Path) -> None:
    file = write_port(tmp_path)
    (tmp_path / "port.json").write_text(json.dumps({"architecture": "Other", "module": "toy.py"}))
    assert load_port(file).__name__ == "Other"


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    load_port(write_port(tmp_path, value=1))
    assert load_port(write_port(tmp_path, value=2)).value == 2  # type: ignore[attr-defined]


def test_a_port_may_import_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "configuration_toy.py").write_text("SIZE = 5\n")
    file = write_port(tmp_path)
    file.write_text("from .configuration_toy import SIZE\n" + file.read_text().replace("value = 1", "value = SIZE"))
    assert load_port(file).value == 5  # type: ignore[attr-defined]


def test_a_reference_leads_another_process_to_the_class(tmp_path: Path) -> None:
    port = load_port(write_port(tmp_path))
    reference = port_reference(port)
    assert reference == f"{tmp_path.resolve() / 'toy.py'}:ToyForCausalLM"
    assert load_port(reference) is port


@pytest.mark.parametrize(
    ("content", "message"),
    [("x = (", "can't be imported"), ("x = 1", "no class with compute_logits"), ("import no_such", "no_such")],
)
def test_a_useless_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(content)
    with pytest.raises(PortError, match=message):
        load_port(tmp_path / "bad.py")


@pytest.mark.parametrize("port", ["/nowhere/port.py", "no_such_module_here:Class", "toy:", "plain"])
def test_a_port_that_is_not_there_is_one_line(port: str) -> None:
    with pytest.raises(PortError):
        load_port(port)
