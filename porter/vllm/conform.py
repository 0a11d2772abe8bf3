"""Checks a port against a vLLM without running either: every import, call and attribute that it uses must be there."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from porter.vllm.library import Symbol

# the protocols whose methods vLLM looks for in a model before it serves it
INTERFACE = ("vllm.model_executor.models.interfaces_base", ("VllmModel", "VllmModelForTextGeneration"))
_OWN = frozenset({"forward", "compute_logits", "load_weights"})  # a port's own; vLLM calls them

Name = tuple[str, str]  # module, name
Symbols = Mapping[Name, Symbol | None]


@dataclass(frozen=True)
class Finding:
    """Something that a vLLM does not have as the port uses it."""

    file: str
    line: int
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}: {self.why}"


@dataclass(frozen=True)
class _Use:
    """A call of, or an attribute of an object of, an imported name."""

    line: int
    name: Name
    positional: int = 0
    keywords: tuple[str, ...] = ()
    attribute: str = ""


def names_used(files: Mapping[str, str]) -> set[Name]:
    """Every name that the port's files import from vLLM, and the interface that it has to have."""
    imported = {name for text in files.values() for name, _ in _imports(ast.parse(text)).values()}
    return imported | {(INTERFACE[0], each) for each in INTERFACE[1]}


def conform(files: Mapping[str, str], symbols: Symbols) -> list[Finding]:
    """What in the port's files does not fit the symbols of a vLLM."""
    found: list[Finding] = []
    for file, text in files.items():
        tree = ast.parse(text)
        imports = _imports(tree)
        for (module, name), line in imports.values():
            if symbols.get((module, name)) is None:
                found.append(Finding(file, line, f"from {module} import {name}", "there is no such name"))
        for use in _uses(tree, {local: name for local, (name, _) in imports.items()}):
            symbol = symbols.get(use.name)
            if symbol is not None and symbol.kind != "value":
                found += [Finding(file, use.line, use.name[1], why) for why in _misfits(use, symbol)]
    return found + _interface(files, symbols)


def port_files(folder: Path) -> dict[str, str]:
    """The Python files of a port's package, by their paths in its folder."""
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in sorted(folder.glob("*/*.py"))
        if path.parent.name != "tests"
    }


def _imports(tree: ast.Module) -> dict[str, tuple[Name, int]]:
    """Local name -> what it is in vLLM, and the line of its import; imports inside functions too."""
    return {
        alias.asname or alias.name: ((node.module, alias.name), node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm"
        for alias in node.names
    }


def _uses(tree: ast.Module, names: Mapping[str, Name]) -> Iterator[_Use]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            starred = any(isinstance(a, ast.Starred) for a in node.args)
            keywords = tuple(k.arg for k in node.keywords if k.arg is not None)
            yield _Use(node.lineno, names[node.func.id], 0 if starred else len(node.args), keywords)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            yield _Use(node.lineno, names[node.value.id], attribute=node.attr)
        elif isinstance(node, ast.ClassDef):
            yield from _object_uses(node, names)


def _object_uses(cls: ast.ClassDef, names: Mapping[str, Name]) -> Iterator[_Use]:
    """`self.layer.attribute` where the class makes self.layer from an imported class."""
    made = {
        target.attr: names[node.value.func.id]
        for node in ast.walk(cls)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id in names
        for target in node.targets
        if isinstance(target, ast.Attribute)
    }
    for node in ast.walk(cls):
        layer = node.value if isinstance(node, ast.Attribute) else None
        if isinstance(layer, ast.Attribute) and isinstance(layer.value, ast.Name) and layer.value.id == "self":
            assert isinstance(node, ast.Attribute)
            if layer.attr in made:
                yield _Use(node.lineno, made[layer.attr], attribute=node.attr)


def _misfits(use: _Use, symbol: Symbol) -> Iterator[str]:
    if use.attribute:
        if symbol.kind == "class" and use.attribute not in symbol.attributes:
            yield f"it has no {use.attribute}"
        return
    for keyword in use.keywords:
        if keyword not in symbol.parameters and not symbol.keywords:
            yield f"it takes no {keyword}="
    if use.positional > symbol.positional:
        yield f"it takes {symbol.positional} arguments by position, not {use.positional}"


def _interface(files: Mapping[str, str], symbols: Symbols) -> list[Finding]:
    """The model's class has every method that vLLM looks for."""
    wanted = {
        name
        for each in INTERFACE[1]
        if (symbol := symbols.get((INTERFACE[0], each))) is not None
        for name in symbol.attributes
        if not name.startswith("_")
    }
    for file, text in files.items():
        for node in ast.parse(text).body:
            methods = {f.name: f for f in getattr(node, "body", []) if isinstance(f, ast.FunctionDef)}
            if isinstance(node, ast.ClassDef) and methods.keys() >= _OWN:
                missing = sorted(wanted - methods.keys() - _inherited(node))
                return [Finding(file, node.lineno, node.name, f"vLLM looks for its {name}") for name in missing]
    return []


def _inherited(node: ast.ClassDef) -> set[str]:
    """Class attributes count; what a protocol declares with a default does not have to be there."""
    return {t.id for s in node.body if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)}
