"""Bring classes and functions that a file imports from other modeling files into the file, as text."""

from __future__ import annotations

from pathlib import Path

import libcst as cst

from porter.analyze.program import Program, full_name
from porter.errors import SourceError
from porter.passes import edit
from porter.source import models_folder

DEPTH = 6


def inline_imports(tree: cst.Module, path: Path) -> cst.Module:
    """The file with the definitions that it borrows from other modeling files, each with what it needs in turn.

    A fork that inherits from a model of transformers becomes self-contained this way. Files are looked up beside `path`
    and in the installed transformers; nothing is imported. What can't be found stays an import.
    """
    for _ in range(DEPTH):
        borrowed = _borrowed(tree, path)
        if not borrowed:
            return tree
        for file, names in borrowed.items():
            tree = _with_definitions(tree, Program.read(cst.parse_module(file.read_text(encoding="utf-8"))), names)
    return tree


def _borrowed(tree: cst.Module, path: Path) -> dict[Path, set[str]]:
    """Names that come from other modeling files and are not defined here, by file."""
    program = Program.read(tree)
    local = {*program.classes, *program.functions}
    found: dict[Path, set[str]] = {}
    for statement in edit.walk(tree):
        if not isinstance(statement, cst.ImportFrom) or isinstance(statement.names, cst.ImportStar):
            continue
        file = _file_of(statement, path)
        if file is None:
            continue
        names = {full_name(a.name) for a in statement.names if a.asname is None} - local
        if names:
            found.setdefault(file, set()).update(names)
    return found


def _file_of(node: cst.ImportFrom, path: Path) -> Path | None:
    """The modeling file that an import names: a sibling, or one of the installed transformers."""
    parts = full_name(node.module).split(".") if node.module is not None else []
    if not parts or not parts[-1].startswith("modeling_"):
        return None
    if len(node.relative) == 1 and len(parts) == 1:
        beside = path.with_name(f"{parts[0]}.py")
        return beside if beside.is_file() else None
    model = parts[-1].removeprefix("modeling_")
    try:
        installed = models_folder() / model / f"{parts[-1]}.py"
    except SourceError:
        return None
    inside = "transformers" in parts or len(node.relative) > 1
    return installed if inside and installed.is_file() and installed != path else None


def _with_definitions(tree: cst.Module, other: Program, names: set[str]) -> cst.Module:
    """Add definitions of another file, what they use of it, and its imports, before the first definition here."""
    here = Program.read(tree)
    wanted = _closure(other, names, {*here.classes, *here.functions, *here.constants})
    order = [s for s in other.tree.body if _defines(s) & wanted]
    if not order:
        return _without_names(tree, names)
    read = {n for s in order for n in edit.names_read(s)}
    imports = [
        s
        for s in other.tree.body
        if isinstance(s, cst.SimpleStatementLine)
        and any(isinstance(x, cst.Import | cst.ImportFrom) for x in s.body)
        and set(Program.read(cst.Module([s])).imports) & read - set(here.imports)
    ]
    body = list(_without_names(tree, names).body)
    place = next((i for i, s in enumerate(body) if isinstance(s, cst.ClassDef | cst.FunctionDef)), len(body))
    return tree.with_changes(body=[*body[:place], *imports, *order, *body[place:]])


def _closure(other: Program, names: set[str], known: set[str]) -> set[str]:
    """Names and all that their definitions read of the same file, without those that exist here already."""
    defined = {n: s for s in other.tree.body for n in _defines(s)}
    wanted: set[str] = set()
    todo = [n for n in names if n in defined]
    while todo:
        name = todo.pop()
        if name in wanted or name in known:
            continue
        wanted.add(name)
        todo += [n for n in edit.names_read(defined[name]) if n in defined]
    return wanted


def _defines(statement: cst.CSTNode) -> set[str]:
    if isinstance(statement, cst.ClassDef | cst.FunctionDef):
        return {statement.name.value}
    if isinstance(statement, cst.SimpleStatementLine):
        return {t.value for x in statement.body for t in edit.targets(x) if isinstance(t, cst.Name)}
    return set()


def _without_names(tree: cst.Module, names: set[str]) -> cst.Module:
    """Drop the imports of names that are defined here now."""
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for node in edit.walk(tree):
        if isinstance(node, cst.ImportFrom) and not isinstance(node.names, cst.ImportStar):
            kept = [a for a in node.names if full_name(a.name) not in names or a.asname is not None]
            if not kept:
                edits[node] = edit.remove
            elif len(kept) != len(node.names):
                edits[node] = _keep(kept)
    return edit.rewrite(tree, edits)


def _keep(kept: list[cst.ImportAlias]) -> edit.Edit:
    kept = [*kept[:-1], kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)]
    return lambda updated: updated.with_changes(names=kept)
