"""Take out what fixed values decide: branches, conditions, and names that nothing reads then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import libcst as cst

from porter.passes import edit

_LITERALS = ("True", "False", "None")


def fold(function: cst.FunctionDef, known: Mapping[str, str], present: frozenset[str] = frozenset()) -> cst.FunctionDef:
    """The function where each expression of `known`, by its text, has that literal value; names in `present` are not
    None. What then follows is folded as well, until nothing does."""
    known = dict(known)
    while True:
        folded = function.visit(_Fold(known, present))
        assert isinstance(folded, cst.FunctionDef)
        known |= {name: value for name, value in _settled(folded).items() if name not in known}
        folded = _without_dead(folded)
        if folded.deep_equals(function):
            return function
        function = folded


class _Fold(cst.CSTTransformer):
    def __init__(self, known: Mapping[str, str], present: frozenset[str]) -> None:
        super().__init__()
        self.known, self.present = known, present
        self.elifs: set[cst.If] = set()

    # names are values only where they are read
    def visit_Attribute(self, node: cst.Attribute) -> bool:
        return False

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> Any:
        text = edit.code(original_node)
        if text in self.known:
            return cst.Name(self.known[text])
        return updated_node.with_changes(value=updated_node.value.visit(self))

    def visit_Arg(self, node: cst.Arg) -> bool:
        return False

    def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
        return updated_node.with_changes(value=updated_node.value.visit(self))

    def visit_Param(self, node: cst.Param) -> bool:
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        return False

    def visit_AssignTarget(self, node: cst.AssignTarget) -> bool:
        return not isinstance(node.target, cst.Name | cst.Tuple)

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.Name:
        return updated_node.with_changes(value=self.known.get(updated_node.value, updated_node.value))

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> Any:
        text = edit.code(original_node)
        return cst.Name(self.known[text]) if text in self.known else updated_node

    def leave_Comparison(self, original_node: cst.Comparison, updated_node: cst.Comparison) -> Any:
        text = edit.code(original_node.with_changes(lpar=[], rpar=[]))
        if text in self.known:
            return cst.Name(self.known[text])
        if len(updated_node.comparisons) != 1 or edit.code(updated_node.comparisons[0].comparator) != "None":
            return updated_node
        operator, left = updated_node.comparisons[0].operator, edit.code(updated_node.left)
        if left not in _LITERALS and left not in self.present:
            return updated_node
        return cst.Name(str((left == "None") == isinstance(operator, cst.Is)))

    def leave_UnaryOperation(self, original_node: cst.UnaryOperation, updated_node: cst.UnaryOperation) -> Any:
        value = _truth(updated_node.expression)
        if value is None or not isinstance(updated_node.operator, cst.Not):
            return updated_node
        return cst.Name(str(not value))

    def leave_BooleanOperation(self, original_node: cst.BooleanOperation, updated_node: cst.BooleanOperation) -> Any:
        decisive = isinstance(updated_node.operator, cst.Or)  # True or x; False and x
        left, right = _truth(updated_node.left), _truth(updated_node.right)
        if left is not None:
            return _inside(updated_node, updated_node.left if left is decisive else updated_node.right)
        if right is not None and right is not decisive:
            return _inside(updated_node, updated_node.left)
        return updated_node

    def leave_IfExp(self, original_node: cst.IfExp, updated_node: cst.IfExp) -> Any:
        value = _truth(updated_node.test)
        if value is None:
            return updated_node
        return _inside(updated_node, updated_node.body if value else updated_node.orelse)

    def visit_If(self, node: cst.If) -> None:
        if isinstance(node.orelse, cst.If):
            self.elifs.add(node.orelse)

    def leave_If(self, original_node: cst.If, updated_node: cst.If) -> Any:
        value = _truth(updated_node.test)
        if value is None:
            return updated_node
        if original_node in self.elifs:
            return cst.Else(updated_node.body) if value else updated_node.orelse or cst.RemoveFromParent()
        taken = updated_node.body if value else getattr(updated_node.orelse, "body", None)
        if not value and isinstance(updated_node.orelse, cst.If):
            return updated_node.orelse
        return cst.FlattenSentinel(taken.body) if taken is not None else cst.RemoveFromParent()


def _inside(outer: cst.BaseExpression, inner: cst.BaseExpression) -> cst.BaseExpression:
    """What is left of an expression, in its parentheses: they may hold line breaks."""
    return inner.with_changes(lpar=[*outer.lpar, *inner.lpar], rpar=[*inner.rpar, *outer.rpar])


def _truth(node: cst.BaseExpression) -> bool | None:
    if isinstance(node, cst.BooleanOperation) and not any(isinstance(x, cst.Call) for x in edit.walk(node)):
        decisive = isinstance(node.operator, cst.Or)
        return decisive if _truth(node.right) is decisive else None
    return {"True": True, "False": False, "None": False}.get(edit.code(node).strip("()"))


def _assignments(function: cst.FunctionDef) -> dict[str, list[cst.CSTNode]]:
    """The statements that bind each local name; a parameter counts as one."""
    found: dict[str, list[cst.CSTNode]] = {p.name.value: [p] for p in edit.params_of(function)}
    for node in edit.walk(function.body):
        if isinstance(node, cst.Assign | cst.AugAssign | cst.AnnAssign):
            bound = [x for target in edit.targets(node) for x in edit.leaves(target)]
        elif isinstance(node, cst.For | cst.CompFor | cst.NamedExpr):
            bound = edit.leaves(node.target)
        elif isinstance(node, cst.ImportAlias):
            bound = [node.asname.name if node.asname is not None else node.name]
        else:
            continue
        for target in bound:
            if isinstance(target, cst.Name):
                found.setdefault(target.value, []).append(node)
    return found


def _settled(function: cst.FunctionDef) -> dict[str, str]:
    """Local names that only ever have one literal value."""
    found = {}
    for name, nodes in _assignments(function).items():
        node = nodes[0]
        if len(nodes) == 1 and isinstance(node, cst.Assign) and edit.code(node.value) in _LITERALS:
            found[name] = edit.code(node.value)
    return found


def _without_dead(function: cst.FunctionDef) -> cst.FunctionDef:
    """Without bindings of names that nothing reads, where nothing is called for them, and calls of loggers."""
    lines = [s for s in edit.walk(function.body) if isinstance(s, cst.SimpleStatementLine)]
    imports: dict[cst.CSTNode, edit.Edit] = {s: edit.remove for s in lines if isinstance(s.body[0], cst.ImportFrom)}
    bare = edit.rewrite(cst.Module([function]), imports).body[0]
    assert isinstance(bare, cst.FunctionDef)
    read = edit.names_read(bare.body)
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for node in edit.walk(function.body):
        dead = isinstance(node, cst.SimpleStatementLine) and all(_is_dead(small, read) for small in node.body)
        if dead or (isinstance(node, cst.If) and _only_pass(node)):
            edits[node] = edit.remove
    tree = cst.Module([function])
    after = edit.rewrite(tree, edits).body[0]
    assert isinstance(after, cst.FunctionDef)
    return after


def _only_pass(node: cst.If) -> bool:
    calls = any(isinstance(inner, cst.Call) for inner in edit.walk(node.test))
    bodies = [node.body, *([node.orelse.body] if node.orelse is not None else [])]
    lines = [s for body in bodies for s in body.body]
    empty = all(isinstance(s, cst.SimpleStatementLine) and all(isinstance(x, cst.Pass) for x in s.body) for s in lines)
    return empty and not isinstance(node.orelse, cst.If) and (not calls or "is_torch" in edit.code(node.test))


def _is_dead(small: cst.BaseSmallStatement, read: set[str]) -> bool:
    if isinstance(small, cst.ImportFrom) and not isinstance(small.names, cst.ImportStar):
        return not any(edit.code(alias.asname.name if alias.asname else alias.name) in read for alias in small.names)
    if isinstance(small, cst.Expr):
        return edit.code(small.value).startswith(("logger.", "warnings."))
    if not isinstance(small, cst.Assign) or any(isinstance(x, cst.Call) for x in edit.walk(small.value)):
        return False
    leaves = [x for target in edit.targets(small) for x in edit.leaves(target)]
    return all(isinstance(x, cst.Name) and (x.value not in read) for x in leaves)
