"""Small tools for rewriting libcst trees by node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import libcst as cst

Edit = Callable[[Any], Any]


class _Rewriter(cst.CSTTransformer):
    def __init__(self, edits: Mapping[cst.CSTNode, Edit]) -> None:
        super().__init__()
        self.edits = edits

    def on_leave(self, original_node: Any, updated_node: Any) -> Any:
        edit = self.edits.get(original_node)
        return edit(updated_node) if edit is not None else updated_node


def rewrite(tree: cst.Module, edits: Mapping[cst.CSTNode, Edit]) -> cst.Module:
    """Apply each edit to its node; an edit gets the node with its children already rewritten."""
    if not edits:
        return tree
    result = tree.visit(_Rewriter(edits))
    assert isinstance(result, cst.Module)
    return tidy(result)


class _Tidy(cst.CSTTransformer):
    """Repair what edits leave: empty blocks, empty ifs, bare `pass`."""

    def leave_SimpleStatementLine(self, original_node: cst.SimpleStatementLine,
                                  updated_node: cst.SimpleStatementLine) -> Any:
        return updated_node if updated_node.body else cst.RemoveFromParent()

    def leave_IndentedBlock(self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock) -> Any:
        if updated_node.body:
            return updated_node
        return updated_node.with_changes(body=[cst.SimpleStatementLine([cst.Pass()])])

    def leave_If(self, original_node: cst.If, updated_node: cst.If) -> Any:
        orelse = updated_node.orelse
        if isinstance(orelse, cst.Else) and only_pass(orelse.body):
            updated_node = updated_node.with_changes(orelse=None)
        if only_pass(updated_node.body):
            if updated_node.orelse is None:
                return cst.RemoveFromParent()
            if isinstance(updated_node.orelse, cst.Else):
                return updated_node.with_changes(
                    test=negate(updated_node.test), body=updated_node.orelse.body, orelse=None)
        return updated_node

    def leave_For(self, original_node: cst.For, updated_node: cst.For) -> Any:
        return cst.RemoveFromParent() if only_pass(updated_node.body) else updated_node

    def leave_With(self, original_node: cst.With, updated_node: cst.With) -> Any:
        return cst.RemoveFromParent() if only_pass(updated_node.body) else updated_node


def tidy(tree: cst.Module) -> cst.Module:
    result = tree.visit(_Tidy())
    assert isinstance(result, cst.Module)
    return result


def only_pass(body: cst.BaseSuite) -> bool:
    return all(isinstance(s, cst.SimpleStatementLine) and all(isinstance(x, cst.Pass) for x in s.body)
               for s in body.body)


def negate(test: cst.BaseExpression) -> cst.BaseExpression:
    if isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not):
        return test.expression
    if isinstance(test, cst.Comparison) and len(test.comparisons) == 1:
        flipped = {cst.Is: cst.IsNot, cst.IsNot: cst.Is, cst.Equal: cst.NotEqual, cst.NotEqual: cst.Equal}
        target = test.comparisons[0]
        kind = flipped.get(type(target.operator))
        if kind is not None:
            return test.with_changes(comparisons=[target.with_changes(operator=kind())])
    inner = test if isinstance(test, cst.Name | cst.Attribute | cst.Call) else parenthesized(test)
    return cst.UnaryOperation(cst.Not(), inner)


def parenthesized(node: cst.BaseExpression) -> cst.BaseExpression:
    if node.lpar or isinstance(node, cst.Name | cst.Attribute | cst.Call | cst.Subscript | cst.Integer):
        return node
    return node.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])


def remove(_: cst.CSTNode) -> Any:
    return cst.RemoveFromParent()


def replace(code: str) -> Edit:
    """An edit that puts an expression in place of a node."""
    return lambda _: parse(code)


def parse(code: str) -> cst.BaseExpression:
    return cst.parse_expression(code)


def statement(code: str) -> cst.SimpleStatementLine:
    parsed = cst.parse_statement(code)
    assert isinstance(parsed, cst.SimpleStatementLine)
    return parsed


def block(code: str) -> list[cst.BaseStatement]:
    return [s for s in cst.parse_module(code).body if isinstance(s, cst.BaseStatement)]


def code(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node).strip()


def walk(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """A node and all below it, in source order."""
    yield node
    for child in node.children:
        yield from walk(child)


def names_read(node: cst.CSTNode) -> set[str]:
    """Names that an expression or statement reads (attribute names and keywords are not names)."""
    found: set[str] = set()
    _collect(node, found)
    return found


def _collect(node: cst.CSTNode, found: set[str]) -> None:
    if isinstance(node, cst.Name):
        found.add(node.value)
    elif isinstance(node, cst.Attribute):
        _collect(node.value, found)
    elif isinstance(node, cst.Arg):
        _collect(node.value, found)
    elif isinstance(node, cst.Assign):
        _collect(node.value, found)
        for target in node.targets:
            _collect_target(target.target, found)
    elif isinstance(node, cst.AnnAssign):
        if node.value is not None:
            _collect(node.value, found)
        _collect_target(node.target, found)
    else:
        for child in node.children:
            _collect(child, found)


def _collect_target(target: cst.CSTNode, found: set[str]) -> None:
    """A target reads what it is an attribute or item of."""
    if isinstance(target, cst.Attribute | cst.Subscript):
        for child in target.children:
            _collect(child, found)
    elif isinstance(target, cst.Tuple | cst.List):
        for element in target.elements:
            _collect_target(element.value, found)


def targets(small: cst.CSTNode) -> list[cst.BaseExpression]:
    """What an assignment binds, tuples taken apart."""
    if isinstance(small, cst.Assign):
        return [leaf for t in small.targets for leaf in leaves(t.target)]
    if isinstance(small, cst.AnnAssign | cst.AugAssign):
        return leaves(small.target)
    return []


def leaves(target: cst.BaseExpression) -> list[cst.BaseExpression]:
    if isinstance(target, cst.Tuple | cst.List):
        return [leaf for element in target.elements for leaf in leaves(element.value)]
    return [target]


def functions(tree: cst.CSTNode) -> list[cst.FunctionDef]:
    return [n for n in walk(tree) if isinstance(n, cst.FunctionDef)]


def lines(function: cst.FunctionDef) -> list[cst.SimpleStatementLine]:
    return [n for n in walk(function.body) if isinstance(n, cst.SimpleStatementLine)]


def without_arguments(call: cst.Call, drop: Sequence[int]) -> cst.Call:
    kept = [a for i, a in enumerate(call.args) if i not in drop]
    if kept:
        last = kept[-1]
        if len(kept) != len(call.args) and isinstance(last.comma, cst.Comma) and "\n" not in code(call):
            kept[-1] = last.with_changes(comma=cst.MaybeSentinel.DEFAULT)
    return call.with_changes(args=kept)


def params_of(function: cst.FunctionDef) -> list[cst.Param]:
    p = function.params
    return [*p.posonly_params, *p.params, *p.kwonly_params]


def union(edits: Iterable[Mapping[cst.CSTNode, Edit]]) -> dict[cst.CSTNode, Edit]:
    total: dict[cst.CSTNode, Edit] = {}
    for some in edits:
        total.update(some)
    return total


_PARENTS: dict[int, tuple[cst.Module, dict[cst.CSTNode, cst.CSTNode]]] = {}


def parent(tree: cst.Module, node: cst.CSTNode) -> cst.CSTNode | None:
    if id(tree) not in _PARENTS:
        _PARENTS.clear()
        _PARENTS[id(tree)] = (tree, {child: above for above in walk(tree) for child in above.children})
    return _PARENTS[id(tree)][1].get(node)


def enclosing(tree: cst.Module, node: cst.CSTNode, *kinds: type) -> Any:
    """The nearest node around (or at) `node` of one of the kinds, else None."""
    current: cst.CSTNode | None = node
    while current is not None and not isinstance(current, kinds):
        current = parent(tree, current)
    return current


def add_imports(tree: cst.Module, wanted: Mapping[str, Iterable[str]]) -> cst.Module:
    """Add `from module import names` lines after the last import, for names that are not imported yet."""
    from porter.analyze.program import Program

    present = set(Program.read(tree).imports)
    new = [statement(f"from {module} import {', '.join(sorted(set(names) - present))}")
           for module, names in sorted(wanted.items()) if set(names) - present]
    if not new:
        return tree
    body = list(tree.body)
    place = max((i + 1 for i, s in enumerate(body) if isinstance(s, cst.SimpleStatementLine)
                 and any(isinstance(x, cst.Import | cst.ImportFrom) for x in s.body)), default=0)
    return tree.with_changes(body=[*body[:place], *new, *body[place:]])


def choose(cases: Sequence[tuple[Mapping[str, bool], str]]) -> str:
    """One expression for values that differ from path to path: a conditional over the config conditions."""
    if len({text for _, text in cases}) == 1:
        return cases[0][1]
    keys = sorted({k for decisions, _ in cases for k in decisions})
    best: tuple[int, str] | None = None
    for key in keys:
        if not all(key in d for d, _ in cases):
            continue
        yes, no = ({t for d, t in cases if d[key] is want} for want in (True, False))
        if yes and no and (best is None or len(yes) + len(no) < best[0]):
            best = (len(yes) + len(no), key)
    if best is None:
        raise ValueError("the paths do not tell the values apart")
    key = best[1]
    yes_text, no_text = (choose([c for c in cases if c[0][key] is want]) for want in (True, False))
    yes_text = f"({yes_text})" if " if " in yes_text else yes_text
    return f"{yes_text} if {key} else {no_text}"
