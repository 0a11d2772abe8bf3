"""Whole conversions of the tiny models, byte for byte as they were approved: `--update-golden` approves anew."""

import ast
import difflib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from porter.convert import convert
from porter.errors import Refusal
from porter.source import load

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
NAMES = ("acorn", "birch", "cedar", "dogwood", "elm", "fir", "ginkgo", "hazel", "juniper", "laurel")
PORTS = sorted(GOLDEN.glob("*.py"))
ENDINGS = (".py", ".refused.txt")


@cache
def outcome(name: str) -> tuple[str, str]:
    """The file name in tests/golden and its text: the port, or the one line that says why there is none."""
    try:
        conversion = convert(load(str(HERE / "models" / name)))
    except Refusal as refusal:
        return f"{name}.refused.txt", f"{refusal}\n"
    return f"{name}.py", conversion.code


def approved(name: str) -> Path:
    """What tests/golden holds for a model; its port's path if there is nothing yet."""
    return next((path for ending in ENDINGS if (path := GOLDEN / f"{name}{ending}").exists()), GOLDEN / f"{name}.py")


def difference(old: Path, new: tuple[str, str]) -> str:
    before = old.read_text(encoding="utf-8") if old.exists() else ""
    lines = difflib.unified_diff(before.splitlines(True), new[1].splitlines(True), old.name, new[0])
    return "".join(lines) or ("" if old.name == new[0] else f"{old.name} became {new[0]}")


@pytest.mark.parametrize("name", NAMES)
def test_a_conversion_gives_the_approved_text(name: str, update_golden: bool) -> None:
    found = outcome(name)
    if update_golden:
        for ending in ENDINGS:
            (GOLDEN / f"{name}{ending}").unlink(missing_ok=True)
        (GOLDEN / found[0]).write_text(found[1], encoding="utf-8")
    told = difference(approved(name), found)
    assert not told, f"pytest --update-golden approves this:\n{told}"


def test_every_golden_file_belongs_to_a_model() -> None:
    assert {path.name.split(".")[0] for path in GOLDEN.iterdir() if path.suffix in (".py", ".txt")} == set(NAMES)


@pytest.mark.parametrize("port", PORTS, ids=lambda path: path.stem)
def test_a_port_takes_only_its_config_class_from_transformers(port: Path) -> None:
    imports = [
        n for n in ast.walk(ast.parse(port.read_text(encoding="utf-8"))) if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    plain = {alias.name for n in imports if isinstance(n, ast.Import) for alias in n.names}
    assert {name.split(".")[0] for name in plain} <= {"math", "torch"}
    taken = {(n.module, alias.name) for n in imports if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert {t for t in taken if str(t[0]).startswith("transformers")} <= {("transformers", "PretrainedConfig")}
    assert {str(module).split(".")[0] for module, _ in taken} <= {"collections", "porter", "torch", "transformers"}


@pytest.mark.parametrize("port", PORTS, ids=lambda path: path.stem)
def test_a_port_imports_nothing_that_it_does_not_use(port: Path) -> None:
    text = port.read_text(encoding="utf-8")
    compile(text, port.name, "exec")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "--stdin-filename", "port.py", "-"]
    checked = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("port", PORTS, ids=lambda path: path.stem)
def test_no_line_of_a_port_is_longer_than_a_screen(port: Path) -> None:
    lines = port.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("# ")] == []


@pytest.mark.parametrize("port", PORTS, ids=lambda path: path.stem)
def test_a_port_imports_without_its_original(port: Path) -> None:
    from porter.runtime.model_registry import load_port

    assert load_port(port).__name__ == f"{port.stem.capitalize()}ForCausalLM" or port.stem == "elm"
