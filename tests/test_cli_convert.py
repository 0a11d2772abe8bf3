"""`porter convert` writes whole ports, keeps what a person changed, and can tell drift; the converter is a stand-in."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from porter import atomic
from porter.cli import app
from porter.errors import Refusal
from porter.manifest import text_sha256

SOURCE = "class A:\n    dropout = 1\n    x = 2\n"
CODE = "class A:\n    x = 2\n"
EDIT = {
    "pass": "drop-dropout",
    "line": 2,
    "before": "dropout = 1",
    "after": "",
    "reason": "dropout is off in inference",
}


@dataclass(frozen=True)
class FakeConversion:
    code: str
    manifest: dict[str, Any]
    module_name: str = "acorn"
    others: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FakeSource:
    text: str


Convert = Callable[..., Result]


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A converter whose result is CODE, installed in place of porter.convert and porter.source."""
    import porter

    convert, source = ModuleType("porter.convert"), ModuleType("porter.source")
    manifest = {
        "porter": "0",
        "architecture": "AcornForCausalLM",
        "module": "acorn.py",
        "module_sha256": text_sha256(CODE),
        "edits": [EDIT],
        "verified": None,
    }
    vars(convert)["convert"] = lambda source, target="native": FakeConversion(CODE, manifest)
    vars(source)["load"] = lambda name: FakeSource(SOURCE)
    for module in (convert, source):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(porter, module.__name__.split(".")[1], module, raising=False)
    return convert


@pytest.fixture
def convert(converter: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, ["convert", "acorn.py", *args])


def test_writes_the_module_and_its_manifest(convert: Convert, tmp_path: Path) -> None:
    result = convert("-o", "out")
    assert (result.exit_code, result.stdout) == (0, "out/acorn.py\n")
    assert (tmp_path / "out/acorn.py").read_text() == CODE
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["acorn.py", "port.json"]


def test_the_default_folder_is_named_after_the_model(convert: Convert, tmp_path: Path) -> None:
    convert()
    assert (tmp_path / "ports/acorn/acorn.py").is_file()


def test_json_holds_the_path_and_the_manifest(convert: Convert) -> None:
    found = json.loads(convert("-o", "out", "--json").stdout)
    assert (found["path"], found["manifest"]["architecture"]) == ("out/acorn.py", "AcornForCausalLM")


def test_a_second_run_overwrites_what_nobody_changed(convert: Convert) -> None:
    assert [convert("-o", "out").exit_code for _ in range(2)] == [0, 0]


def test_an_edited_port_is_kept_without_force(convert: Convert, tmp_path: Path) -> None:
    convert("-o", "out")
    module = tmp_path / "out/acorn.py"
    module.write_text("# mine\n")
    result = convert("-o", "out")
    assert (result.exit_code, module.read_text()) == (2, "# mine\n")
    assert "--force" in result.stderr
    assert convert("-o", "out", "--force").exit_code == 0
    assert module.read_text() == CODE


def test_a_file_of_unknown_origin_is_kept_without_force(convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "acorn.py").write_text(SOURCE)
    assert convert("-o", ".").exit_code == 2
    assert (tmp_path / "acorn.py").read_text() == SOURCE


def test_check_is_silent_when_nothing_drifted(convert: Convert) -> None:
    convert("-o", "out")
    result = convert("-o", "out", "--check")
    assert (result.exit_code, result.stdout) == (0, "")


def test_check_shows_the_drift_and_exits_1(convert: Convert, tmp_path: Path) -> None:
    convert("-o", "out")
    (tmp_path / "out/acorn.py").write_text(CODE + "y = 3\n")
    result = convert("-o", "out", "--check")
    assert result.exit_code == 1
    assert "-y = 3" in result.stdout.splitlines()


def test_check_ignores_the_record_of_verification(convert: Convert, tmp_path: Path) -> None:
    convert("-o", "out")
    file = tmp_path / "out/port.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "verified": {"dtype": "float32"}}, indent=2))
    assert convert("-o", "out", "--check").exit_code == 0


def test_check_without_a_port_says_so(convert: Convert) -> None:
    assert convert("-o", "nowhere", "--check").exit_code == 2


def test_diff_gives_the_reason_and_writes_nothing(convert: Convert, tmp_path: Path) -> None:
    lines = convert("--diff").stdout.splitlines()
    assert "-    dropout = 1" in lines
    assert "# drop-dropout, line 2: dropout is off in inference" in lines
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_names_file_and_line_and_writes_nothing(
    convert: Convert, converter: ModuleType, tmp_path: Path
) -> None:
    def refuse(source: object, target: str) -> None:
        raise Refusal("acorn.py", 7, "x.fold(1)", "no layout is known for it", "report it")

    vars(converter)["convert"] = refuse
    result = convert("-o", "out")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: acorn.py:7: P100 x.fold(1): no layout is known for it; report it\n",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", [1, 2], ids=["first file", "second file"])
def test_a_failed_write_leaves_no_trace(
    convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    written: list[Path] = []
    write = atomic._write_through

    def fail(path: Path, text: str) -> None:
        written.append(path)
        if len(written) == broken:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(atomic, "_write_through", fail)
    result = convert("-o", "out")
    assert (result.exit_code, "No space left" in result.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_may_not_be_a_file(convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert convert("-o", "out").exit_code == 2


def test_a_manifest_that_json_spells_otherwise_is_no_drift(converter: ModuleType, convert: Convert) -> None:
    fake = vars(converter)["convert"](FakeSource(SOURCE))
    fake.manifest["spec"] = {"skip": ("a", "b")}
    vars(converter)["convert"] = lambda source, target="native": fake
    assert convert("-o", "out").exit_code == 0
    assert convert("-o", "out", "--check").exit_code == 0
