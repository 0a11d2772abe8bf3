"""The helpers that a port brings along: those that it reads, from the target's and the runtime's own text."""

from __future__ import annotations

from importlib.resources import files

import libcst as cst

from porter.passes import edit

_RUNTIME = ("layers/alibi.py", "layers/rope.py")  # plain Python that other engines lack
_ERRORS = {"ConfigError": "ValueError"}


def support_text(text: str, port: str) -> str:
    """`text` with only the definitions that `port` imports from `.support`, and what those read in turn."""
    tree = cst.parse_module(text)
    known: dict[str, cst.BaseStatement] = {}
    for module in (tree, *map(_runtime, _RUNTIME)):
        known |= {name: s for s in module.body for name in _defined(s) if isinstance(s, cst.BaseStatement)}
    wanted = _reached(_imported(cst.parse_module(port)), known)
    body = [s for s in dict.fromkeys(known[n] for n in known) if set(_defined(s)) & wanted]
    text = tree.with_changes(body=[*_head(tree, body), *body]).code
    for name, builtin in _ERRORS.items():
        text = text.replace(f"{name}(", f"{builtin}(")
    return _formatted(text)


def _runtime(path: str) -> cst.Module:
    return cst.parse_module((files("porter.runtime") / path).read_text(encoding="utf-8"))


def _defined(statement: cst.CSTNode) -> list[str]:
    """The names that a top-level statement defines; imports bind theirs too."""
    if isinstance(statement, cst.FunctionDef | cst.ClassDef):
        return [statement.name.value]
    if isinstance(statement, cst.SimpleStatementLine):
        return [n for small in statement.body for t in edit.targets(small) if (n := edit.code(t))]
    return []


def _imported(port: cst.Module) -> set[str]:
    return {
        alias.evaluated_name
        for node in edit.walk(port)
        if isinstance(node, cst.ImportFrom) and node.relative and not isinstance(node.names, cst.ImportStar)
        for alias in node.names
    }


def _reached(names: set[str], known: dict[str, cst.BaseStatement]) -> set[str]:
    found: set[str] = set()
    todo = set(names)
    while todo:
        name = todo.pop()
        if name in known and name not in found:
            found.add(name)
            todo |= {n.value for n in edit.walk(known[name]) if isinstance(n, cst.Name)}
    return found


def _head(tree: cst.Module, body: list[cst.BaseStatement]) -> list[cst.BaseStatement]:
    """The docstring and the imports that the kept definitions read."""
    read = {n.value for s in body for n in edit.walk(s) if isinstance(n, cst.Name)}
    kept: list[cst.BaseStatement] = []
    for statement in tree.body:
        small = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
        if isinstance(small, cst.Expr):
            kept.append(statement)
        elif isinstance(small, cst.Import | cst.ImportFrom) and not isinstance(small.names, cst.ImportStar):
            names = [a for a in small.names if (a.evaluated_alias or a.evaluated_name) in read]
            if names:
                names[-1] = names[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
                kept.append(statement.with_changes(body=[small.with_changes(names=names)]))
    return kept


def _formatted(text: str) -> str:
    import black

    return black.format_str(text, mode=black.Mode(line_length=120))
