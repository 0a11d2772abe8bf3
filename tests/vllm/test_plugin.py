"""What `porter convert --target vllm` writes: a package whose every file parses and whose names fit today's vLLM."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from porter.convert import Conversion, convert
from porter.errors import EditedError
from porter.manifest import read_port, write_port
from porter.source import load
from porter.vllm.conform import conform, port_files
from porter.vllm.versions import known_releases

MODELS = Path(__file__).parents[1] / "models"


@pytest.fixture(scope="module", params=["acorn", "elm", "hazel"])
def conversion(request: pytest.FixtureRequest) -> Conversion:
    name = request.param
    return convert(load(str(MODELS / name / f"modeling_{name}.py")), "vllm")


@pytest.fixture
def folder(conversion: Conversion, tmp_path: Path) -> Path:
    write_port(tmp_path / "port", conversion.code, conversion.manifest, others=conversion.others)
    return tmp_path / "port"


def test_the_package_is_whole(folder: Path) -> None:
    port = read_port(folder)
    package = port.path.parent.name
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["vllm.general_plugins"] == {package: f"{package}:register"}
    for file in folder.rglob("*.py"):
        ast.parse(file.read_text())
    assert f"{package}.{port.path.stem}:{port.architecture}" in (folder / package / "__init__.py").read_text()
    assert "vllm serve" in (folder / "README.md").read_text()
    assert "runpy" in (folder / "README.md").read_text()


def test_it_fits_every_release_of_the_map(folder: Path) -> None:
    for version, symbols in known_releases().items():
        assert conform(port_files(folder), symbols) == [], version


def test_it_reads_nothing_of_porter(folder: Path) -> None:
    for file in (folder / read_port(folder).path.parent.name).glob("*.py"):
        imported = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not [n.module for n in imported if (n.module or "").startswith("porter")]


def test_registering_imports_no_model(folder: Path) -> None:
    """vLLM registers plugins in every process: it must be cheap, lazy and safe to repeat."""
    package = read_port(folder).path.parent.name
    method = "    @classmethod\n    def register_model(cls, *a): cls.seen.append(a)\n"
    (folder / "vllm.py").write_text(f"class ModelRegistry:\n    seen = []\n{method}")
    code = (
        f"import sys, {package} as p, vllm; p.register(); p.register(); "
        "assert len(set(vllm.ModelRegistry.seen)) == 1; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_a_person_s_change_to_any_file_is_kept(folder: Path, conversion: Conversion) -> None:
    (folder / "README.md").write_text("mine")
    with pytest.raises(EditedError, match=r"README\.md"):
        write_port(folder, conversion.code, conversion.manifest, others=conversion.others)


def test_converting_again_gives_the_same(folder: Path, conversion: Conversion) -> None:
    write_port(folder, conversion.code, conversion.manifest, others=conversion.others)
    assert read_port(folder).path.read_text() == conversion.code
