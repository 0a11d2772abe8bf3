"""The arrows of the house: kernels <- runtime <- porter, and links that no tool trips over."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("kernels", "runtime", "templates")

# What may import the runtime inside porter, as prefixes of module names.
RUNS_MODELS = (
    "porter.vllm.",
    "porter.analyze",
    "porter.bench",
    "porter.cli",
    "porter.commands",
    "porter.registry",
    "porter.serve",
    "porter.verify",
    "porter.needs",
    "porter.weights",
)
# What the engine must do without: the tool's own libraries.
TOOLS = {"jinja2", "libcst", "rich", "typer"}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of ours by its real path: ("porter.runtime.engine", runtime/engine.py) and so on."""
    for folder, prefix in (("kernels", "porter."), ("runtime", "porter."), ("porter", "")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if folder == "porter" and relative.parts[1] in LINKED:
                continue
            name = prefix + ".".join(relative.with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def breaches(layer: str, allowed: tuple[str, ...]) -> list[str]:
    """Imports of porter's modules, made by modules under `layer`, that are not under one of `allowed`."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for name, path in modules()
        if name.startswith(layer + ".")
        for line, target in imports(path)
        if target.split(".")[0] == "porter" and not target.startswith(tuple(f"{a}." for a in allowed))
    ]


def test_kernels_import_nothing_of_porter_but_kernels() -> None:
    assert breaches("porter.kernels", ("porter.kernels",)) == []


def test_runtime_imports_nothing_of_porter_but_kernels_and_runtime() -> None:
    assert breaches("porter.runtime", ("porter.kernels", "porter.runtime")) == []


def test_only_what_runs_models_imports_the_runtime() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for name, path in modules()
        if not name.startswith(("porter.kernels.", "porter.runtime.", *RUNS_MODELS))
        for line, target in imports(path)
        if target.startswith(("porter.runtime", "porter.kernels"))
    ]
    assert found == []


def test_the_engine_does_without_the_tools_libraries() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for name, path in modules()
        if name.startswith(("porter.kernels.", "porter.runtime."))
        for line, target in imports(path)
        if target.split(".")[0] in TOOLS
    ]
    assert found == []


def test_linked_folders_are_never_imported_by_their_bare_names() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for _, path in modules()
        for line, target in imports(path)
        if target.split(".")[0] in LINKED
    ]
    assert found == []


def test_everything_imported_is_declared_as_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    serving = project["optional-dependencies"]["serve"]  # imported only by what the server and its bench are made of
    listed = [*project["dependencies"], *serving]
    declared = {requirement.split(">")[0].split("=")[0].strip() for requirement in listed}
    declared |= {"pydantic", "starlette", "typing_extensions", "zmq"}  # fastapi brings three; pyzmq is imported as zmq
    optional = {
        "accelerate",
        "gguf",
        "triton",
        "vllm",
    }  # extras, or brought by torch; imported only where they are needed
    elsewhere = {"vllm"}  # porter/vllm/worker.py runs in the environment of vLLM
    known = declared | optional | elsewhere | set(sys.stdlib_module_names) | {"porter"}
    used = {target.split(".")[0] for _, path in modules() for _, target in imports(path)}
    assert used - known == set()


@pytest.mark.parametrize("folder", LINKED)
def test_linked_folders_have_no_init(folder: str) -> None:
    # With one, transformers beside an installed `kernels` distribution imports ours instead.
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", LINKED)
def test_links_are_relative_and_lead_to_the_top_level_folder(folder: str) -> None:
    link = ROOT / "porter" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"
