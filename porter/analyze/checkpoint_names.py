"""Renames between a model's checkpoints and the installed transformers' modules, read from its mapping as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import libcst as cst

from porter.analyze.facts import Facts
from porter.analyze.module_paths import paths_below
from porter.analyze.program import full_name
from porter.source import Source

Mappings = dict[str, list[cst.Call]]


def renames(source: Source, after: Facts, packed: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Checkpoint path piece -> port path piece, for the pieces that the port has.

    They hold for the names of the installed file; an old file still has the checkpoints' own names.
    """
    path = _mapping_file()
    if path is None or source.model_type is None:
        return {}
    mappings = _mappings(path)
    transforms = mappings.get(after.entry.name) or mappings.get(source.model_type) or []
    pairs = [_pair(call) for call in transforms if full_name(call.func) == "WeightRenaming"]
    paths = _port_paths(after, packed)
    return {old: new for old, new in filter(None, pairs) if _applies(old, new, paths)}


def _applies(old: str, new: str, paths: set[str]) -> bool:
    """Whether a port has what is renamed under its new name only."""
    others = [path for path in paths if not _within(new, [path])]
    return len(others) < len(paths) and not _within(old, others)


def _port_paths(after: Facts, packed: Mapping[str, Iterable[str]]) -> set[str]:
    """Dotted paths of a port's modules and tensors, packed ones also under the names that they stand for."""
    paths = {path for world in after.worlds if world.entry is not None for path in paths_below(world.entry)}
    for name, parts in packed.items():
        paths |= {path.replace(f".{name}", f".{part}") for path in paths for part in parts}
    return paths


def _within(piece: str, paths: Iterable[str]) -> bool:
    return any(f".{piece}." in f".{path}." for path in paths)


def _mapping_file() -> Path | None:
    from porter.errors import SourceError
    from porter.source import models_folder

    try:
        path = models_folder().parent / "conversion_mapping.py"
    except SourceError:
        return None
    return path if path.is_file() else None


def _mappings(path: Path) -> Mappings:
    """Class or model type -> the transforms that its checkpoints go through, as the file lists them."""
    tree = cst.parse_module(path.read_text(encoding="utf-8"))
    aliases: dict[str, str] = {}
    found: Mappings = {}
    for statement in _statements(tree):
        target, value = _assignment(statement)
        if target == "mapping" and isinstance(value, cst.Dict):
            found.update({key: _transforms(item, found) for key, item in _pairs(value)})
        elif isinstance(value, cst.Dict):
            aliases.update({key: str(x.evaluated_value) for key, x in _pairs(value) if isinstance(x, cst.SimpleString)})
        elif target.startswith("mapping[") and value is not None:
            before = found.get(_key(target), []) if isinstance(statement, cst.AugAssign) else []
            found[_key(target)] = before + _transforms(value, found)
    return {**{key: found.get(base, []) for key, base in aliases.items()}, **found}


def _statements(tree: cst.Module) -> list[cst.BaseSmallStatement]:
    blocks = [tree.body, *(f.body.body for f in tree.body if isinstance(f, cst.FunctionDef))]
    return [s for block in blocks for line in block if isinstance(line, cst.SimpleStatementLine) for s in line.body]


def _assignment(statement: cst.BaseSmallStatement) -> tuple[str, cst.BaseExpression | None]:
    if isinstance(statement, cst.Assign):
        return _code(statement.targets[0].target), statement.value
    if isinstance(statement, cst.AugAssign | cst.AnnAssign):
        return _code(statement.target), statement.value
    return "", None


def _code(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node)


def _key(target: str) -> str:
    return target.removeprefix("mapping[").rstrip("]").strip("'\"")


def _pairs(node: cst.Dict) -> list[tuple[str, cst.BaseExpression]]:
    return [
        (str(e.key.evaluated_value), e.value)
        for e in node.elements
        if isinstance(e, cst.DictElement) and isinstance(e.key, cst.SimpleString)
    ]


def _transforms(node: cst.BaseExpression, known: Mappings) -> list[cst.Call]:
    """The calls of a list, of `mapping[key].copy()`, or of a sum of such."""
    if isinstance(node, cst.List):
        return [e.value for e in node.elements if isinstance(e.value, cst.Call)]
    if isinstance(node, cst.BinaryOperation):
        return _transforms(node.left, known) + _transforms(node.right, known)
    if isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute):
        return _transforms(node.func.value, known)
    return known.get(_key(_code(node)), [])


def _pair(call: cst.Call) -> tuple[str, str] | None:
    """(checkpoint name, module name) of a rename without wildcards."""
    values = [_only(arg.value) for arg in call.args[:2]]
    names = [plain_name(str(v.evaluated_value)) for v in values if isinstance(v, cst.SimpleString)]
    return (names[0], names[1]) if len(names) == 2 and all(names) else None


def _only(node: cst.BaseExpression) -> cst.BaseExpression:
    return node.elements[0].value if isinstance(node, cst.List) and len(node.elements) == 1 else node


def plain_name(pattern: str) -> str:
    """A regular expression of transformers as a dotted name, if it is one."""
    text = pattern.replace(r"\.", ".").strip("^$").removeprefix(".*").strip(".")
    return text if all(part.isidentifier() for part in text.split(".")) else ""


def calls_in(node: cst.CSTNode) -> list[cst.Call]:
    """Every call at or below a node."""
    own = [node] if isinstance(node, cst.Call) else []
    return own + [c for child in node.children for c in calls_in(child)]
