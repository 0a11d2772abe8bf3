"""`porter conform` and `porter verify --engine vllm` on the command line: what they say, and their exit codes."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from porter.cli import app

ELM = Path(__file__).parents[1] / "models" / "elm" / "modeling_elm.py"
OLD = {
    "vllm/__init__.py": "class ModelRegistry: ...\n",
    "vllm/model_executor/layers/linear.py": (
        "class ColumnParallelLinear:\n    def __init__(self, input_size, output_size, bias=True): ...\n"
    ),
}


def porter(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elm") / "plugin"
    assert porter("convert", ELM, "--target", "vllm", "-o", folder).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def native(plugin: Path) -> Path:
    folder = plugin.parent / "native"
    assert porter("convert", ELM, "-o", folder).exit_code == 0
    return folder


def test_the_known_releases_fit(plugin: Path) -> None:
    result = porter("conform", plugin)
    assert result.exit_code == 0, result.output
    assert "0.20.0" in result.output
    assert "0.33.0" in result.output


def test_an_older_vllm_does_not_fit(plugin: Path, tmp_path: Path) -> None:
    for name, text in OLD.items():
        (tmp_path / "old" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "old" / name).write_text(text)
    result = porter("conform", plugin, "--vllm", tmp_path / "old", "--json")
    assert result.exit_code == 1
    assert "it takes no return_bias=" in result.output


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("conform", "{native}"), "convert with --target vllm"),
        (("verify", "{native}", "--random", "--engine", "vllm", "--vllm-python", "{python}"), "there is no vLLM"),
        (("verify", "{plugin}", "--random"), "pass --engine vllm"),
        (("verify", "{plugin}", "--random", "--engine", "trt"), "no engine"),
        (("register", "{plugin}"), "pip install"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    args: tuple[str, ...], line: str, plugin: Path, native: Path, tmp_path: Path
) -> None:
    places = {"native": native, "plugin": plugin, "python": tmp_path / "python"}
    result = porter(*(each.format(**places) for each in args))
    assert result.exit_code == 2, result.output
    assert line in " ".join(result.output.split())
