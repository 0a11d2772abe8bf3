"""Calls in an __init__ that make layers."""

from __future__ import annotations

import libcst as cst

from porter.analyze.values import Layer
from porter.passes import edit


def creations_of(init: cst.FunctionDef, name: str) -> list[cst.Call]:
    """The calls that make `self.<name>` in an __init__."""
    assigns = [n for n in edit.walk(init.body) if isinstance(n, cst.Assign)]
    return [
        n.value
        for n in assigns
        if isinstance(n.value, cst.Call) and any(edit.code(t) == f"self.{name}" for t in edit.targets(n))
    ]


def assigned_before(tree: cst.Module, init: cst.FunctionDef, node: cst.CSTNode) -> set[str]:
    """Attributes that an __init__ has set when it comes to a node."""
    line = edit.enclosing(tree, node, cst.SimpleStatementLine)
    found: set[str] = set()
    for other in edit.lines(init):
        if other is line:
            return found
        found |= {t.attr.value for small in other.body for t in edit.targets(small) if isinstance(t, cst.Attribute)}
    return found


def creation_parts(creation: cst.Call, layer: Layer | None) -> tuple[str, str]:
    """(input size, bias) as source, from the call that makes a Linear or Conv1D."""
    named = {a.keyword.value: edit.code(a.value) for a in creation.args if a.keyword is not None}
    plain = [edit.code(a.value) for a in creation.args if a.keyword is None]
    if layer is not None and layer.kind == "conv1d":
        return named.get("nx", plain[1] if len(plain) > 1 else "nx"), "True"
    inputs = named.get("in_features", plain[0] if plain else "in_features")
    return inputs, named.get("bias", plain[2] if len(plain) > 2 else "True")
