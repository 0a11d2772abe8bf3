"""Small tools for rewriting libcst trees by node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import libcst as cst

Edit = Callable[[Any], Any]


_LOOKS = (
    "whitespace",
    "lpar",
    "rpar",
    "comma",
    "equal",
    "semicolon",
    "lines",
    "header",
    "footer",
    "newline",
    "indent",
    "colon",
    "dot",
    "lbracket",
    "rbracket",
    "lbrace",
    "rbrace",
    "comment",
    "encoding",
    "prefix",
    "start",
    "end",
)
_FIELDS: dict[type, tuple[str, ...]] = {}


def _fields(node: cst.CSTNode) -> tuple[str, ...]:
    """The fields of a node that hold code, not its look."""
    kind = type(node)
    if kind not in _FIELDS:
        _FIELDS[kind] = tuple(
            n
            for n in kind.__dataclass_fields__
            if n != "value_type"
            and not any(n == look or n.endswith(f"_{look}") or "whitespace" in n for look in _LOOKS)
        )
    return _FIELDS[kind]


_IS_NODE: dict[type, bool] = {}
_CHILDREN: dict[cst.CSTNode, tuple[cst.CSTNode, ...]] = {}
_WALKS: dict[cst.CSTNode, tuple[cst.CSTNode, ...]] = {}
_REMEMBERED = 200_000


def _remember(
    memory: dict[cst.CSTNode, tuple[cst.CSTNode, ...]], node: cst.CSTNode, found: list[cst.CSTNode]
) -> tuple[cst.CSTNode, ...]:
    """Keep what was found for a node, which never changes; forget all when there is too much."""
    if len(memory) > _REMEMBERED:
        memory.clear()
    memory[node] = tuple(found)
    return memory[node]


def _is_node(value: object) -> bool:
    """isinstance(value, CSTNode), remembered by type: the abstract check is slow and this is the inner loop."""
    kind = type(value)
    if kind not in _IS_NODE:
        _IS_NODE[kind] = issubclass(kind, cst.CSTNode)
    return _IS_NODE[kind]


def children(node: cst.CSTNode) -> tuple[cst.CSTNode, ...]:
    """The nodes right below a node, in source order, without whitespace and punctuation; nodes never change."""
    known = _CHILDREN.get(node)
    if known is None:
        found: list[cst.CSTNode] = []
        for name in _fields(node):
            value = getattr(node, name)
            if _is_node(value):
                found.append(value)
            elif type(value) in (list, tuple):
                found += [v for v in value if _is_node(v)]
        known = _remember(_CHILDREN, node, found)
    return known


def rewrite(tree: cst.Module, edits: Mapping[cst.CSTNode, Edit]) -> cst.Module:
    """Apply each edit to its node; an edit gets the node with its children already rewritten."""
    if not edits:
        return tree
    touched: set[cst.CSTNode] = set()
    for node in edits:
        current: cst.CSTNode | None = node
        while current is not None and current not in touched:
            touched.add(current)
            current = parent(tree, current)
    result = _rewritten(tree, edits, touched)
    assert isinstance(result, cst.Module)
    return result


def _rewritten(node: cst.CSTNode, edits: Mapping[cst.CSTNode, Edit], touched: set[cst.CSTNode]) -> Any:
    if node not in touched:
        return node
    changes: dict[str, Any] = {}
    for name in _fields(node):
        value = getattr(node, name)
        if isinstance(value, cst.CSTNode) and value in touched:
            new = _rewritten(value, edits, touched)
            changes[name] = None if isinstance(new, cst.RemovalSentinel) else new
        elif isinstance(value, list | tuple) and any(v in touched for v in value if isinstance(v, cst.CSTNode)):
            changes[name] = [x for v in value for x in _many(_rewritten(v, edits, touched))]
    edit = edits.get(node)
    updated = node.with_changes(**changes) if changes else node
    if edit is None or not isinstance(getattr(updated, "orelse", None), cst.Else):  # tidying could turn its test round
        updated = _tidied(updated)
    return edit(updated) if edit is not None and isinstance(updated, cst.CSTNode) else updated


def _many(value: Any) -> list[Any]:
    if isinstance(value, cst.RemovalSentinel):
        return []
    return [x for v in value for x in _many(v)] if isinstance(value, cst.FlattenSentinel) else [value]


def _tidied(node: Any) -> Any:
    """Repair what edits leave: empty lines of code, empty blocks, ifs and loops without a body."""
    if isinstance(node, cst.SimpleStatementLine):
        return node if node.body else cst.RemoveFromParent()
    if isinstance(node, cst.IndentedBlock):
        return node if node.body else node.with_changes(body=[cst.SimpleStatementLine([cst.Pass()])])
    if isinstance(node, cst.If):
        return _tidied_if(node)
    if isinstance(node, cst.For | cst.With) and only_pass(node.body):
        return cst.RemoveFromParent()
    return node


def _tidied_if(node: cst.If) -> Any:
    if isinstance(node.orelse, cst.Else) and only_pass(node.orelse.body):
        node = node.with_changes(orelse=None)
    if not only_pass(node.body):
        return node
    if node.orelse is None:
        return cst.RemoveFromParent()
    if isinstance(node.orelse, cst.Else):
        return node.with_changes(test=negate(node.test), body=node.orelse.body, orelse=None)
    return node


def only_pass(body: cst.BaseSuite) -> bool:
    return all(
        isinstance(s, cst.SimpleStatementLine) and all(isinstance(x, cst.Pass) for x in s.body) for s in body.body
    )


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


def walk(node: cst.CSTNode) -> tuple[cst.CSTNode, ...]:
    """A node and all below it, in source order."""
    known = _WALKS.get(node)
    if known is None:
        found: list[cst.CSTNode] = []
        _descend(node, found)
        known = _remember(_WALKS, node, found)
    return known


def _descend(node: cst.CSTNode, found: list[cst.CSTNode]) -> None:
    found.append(node)
    for child in children(node):
        _descend(child, found)


def names_read(node: cst.CSTNode) -> set[str]:
    """Names that an expression or statement reads (attribute names and keywords are not names)."""
    found: set[str] = set()
    _collect(node, found)
    return found


def _collect(node: cst.CSTNode, found: set[str]) -> None:
    if isinstance(node, cst.Name):
        found.add(node.value)
    elif isinstance(node, (cst.Attribute, cst.Arg)):
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
        for child in children(node):
            _collect(child, found)


def _collect_target(target: cst.CSTNode, found: set[str]) -> None:
    """A target reads what it is an attribute or item of."""
    if isinstance(target, cst.Attribute | cst.Subscript):
        for child in children(target):
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
        above_of: dict[cst.CSTNode, cst.CSTNode] = {}
        for above in walk(tree):
            above_of.update(dict.fromkeys(children(above), above))
        _PARENTS[id(tree)] = (tree, above_of)
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
    new = [
        statement(f"from {module} import {', '.join(sorted(set(names) - present))}")
        for module, names in sorted(wanted.items())
        if set(names) - present
    ]
    return _after_imports(tree, new)


def add_import(tree: cst.Module, module: str) -> cst.Module:
    """Add `import module` after the last import, unless it is there."""
    from porter.analyze.program import Program

    return tree if module in Program.read(tree).imports else _after_imports(tree, [statement(f"import {module}")])


def _after_imports(tree: cst.Module, new: Sequence[cst.BaseStatement]) -> cst.Module:
    if not new:
        return tree
    body = list(tree.body)
    place = max(
        (
            i + 1
            for i, s in enumerate(body)
            if isinstance(s, cst.SimpleStatementLine)
            and any(isinstance(x, cst.Import | cst.ImportFrom) for x in s.body)
        ),
        default=0,
    )
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


def count_reads(node: cst.CSTNode, name: str) -> int:
    """How often a node reads a name; attributes, keywords and plain targets of that name don't count."""
    if isinstance(node, cst.Name):
        return int(node.value == name)
    if isinstance(node, cst.Attribute | cst.Arg):
        return count_reads(node.value, name)
    if isinstance(node, cst.AssignTarget):
        bare = [t for t in leaves(node.target) if not isinstance(t, cst.Name)]
        return sum(count_reads(t, name) for t in bare)
    return sum(count_reads(child, name) for child in children(node))
