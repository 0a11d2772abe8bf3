"""Return the one tensor that callers use instead of tuples and output classes."""

from __future__ import annotations

import itertools

import libcst as cst

from porter.analyze.facts import CallRecord, Facts
from porter.analyze.values import Sequence, Value
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

_BEFORE = """\
from torch import nn


class OakMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.proj(hidden_states), hidden_states


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mlp = OakMLP(config)

    def forward(self, input_ids):
        hidden_states, _ = self.mlp(self.embed(input_ids))
        return hidden_states
"""
_AFTER = _BEFORE.replace(
    "return self.proj(hidden_states), hidden_states",
    "return self.proj(hidden_states)",
).replace(
    "hidden_states, _ = self.mlp(self.embed(input_ids))",
    "hidden_states = self.mlp(self.embed(input_ids))",
)
_BEFORE_2 = """\
from torch import nn


class OakMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.proj(hidden_states), hidden_states


class OakBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mlp = OakMLP(config)

    def forward(self, hidden_states):
        return self.mlp(hidden_states)


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.block = OakBlock(config)

    def forward(self, input_ids):
        hidden_states, _ = self.block(self.embed(input_ids))
        return hidden_states
"""
_AFTER_2 = _BEFORE_2.replace(
    "return self.proj(hidden_states), hidden_states",
    "return self.proj(hidden_states)",
).replace(
    "hidden_states, _ = self.block(self.embed(input_ids))",
    "hidden_states = self.block(self.embed(input_ids))",
)
_BEFORE_3 = _BEFORE.replace(
    "return self.proj(hidden_states), hidden_states", "return [self.proj(hidden_states)]"
).replace(
    """\
        hidden_states, _ = self.mlp(self.embed(input_ids))
        return hidden_states
""",
    """\
        outputs = self.mlp(self.embed(input_ids))
        others = outputs[1:]
        return outputs[0]
""",
)
_AFTER_3 = (
    _BEFORE_3.replace("return [self.proj(hidden_states)]", "return self.proj(hidden_states)")
    .replace("others = outputs[1:]", "others = []")
    .replace("return outputs[0]", "return outputs")
)
_UNCHANGED = _BEFORE.replace(
    """\
        hidden_states, _ = self.mlp(self.embed(input_ids))
        return hidden_states
""",
    """\
        hidden_states, residual = self.mlp(self.embed(input_ids))
        return hidden_states + residual
""",
)


class UnwrapOutputs(Pass):
    """Attention maps, caches, losses and containers are gone; what is left of a result is returned itself."""

    stage = Stage.STRIP
    reason = "callers use only part of the result"
    EXAMPLES = (Example(_BEFORE, _AFTER), Example(_BEFORE_2, _AFTER_2), Example(_BEFORE_3, _AFTER_3))
    UNCHANGED = (Unchanged(_UNCHANGED, "the caller uses both items"),)

    def apply(self, facts: Facts) -> cst.Module:
        inlined = _inline_tuples(facts)
        if inlined:
            return edit.rewrite(facts.program.tree, inlined)
        for function in sorted(facts.called, key=lambda f: f.name.value):
            edits = _unwrap(facts, function)
            if edits:
                return edit.rewrite(facts.program.tree, edits)
        return facts.program.tree


# -- `outputs = (a, b); return outputs` ------------------------------------------------------------


def _inline_tuples(facts: Facts) -> dict[cst.CSTNode, edit.Edit]:
    """Put a tuple that only a return reads into the return."""
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for function in facts.called:
        lines = edit.lines(function)
        for line, following in itertools.pairwise(lines):
            edits.update(_inline_one(function, line, following))
    return edits


def _inline_one(
    function: cst.FunctionDef, line: cst.SimpleStatementLine, following: cst.SimpleStatementLine
) -> dict[cst.CSTNode, edit.Edit]:
    first, second = line.body[0], following.body[0]
    if (
        not isinstance(first, cst.Assign)
        or len(first.targets) != 1
        or not isinstance(first.targets[0].target, cst.Name)
    ):
        return {}
    name = first.targets[0].target.value
    if not isinstance(second, cst.Return) or second.value is None or not _tuple_like(first.value):
        return {}
    uses = [n for n in edit.walk(second.value) if isinstance(n, cst.Name) and n.value == name]
    if len(uses) != 1:
        return {}
    return {first: edit.remove, uses[0]: lambda _: edit.parenthesized(first.value)}


def _tuple_like(node: cst.BaseExpression) -> bool:
    if isinstance(node, cst.BinaryOperation):
        return isinstance(node.operator, cst.Add) and (_tuple_like(node.left) or _tuple_like(node.right))
    return isinstance(node, cst.Tuple | cst.List)


# -- one item of a result --------------------------------------------------------------------------


def _unwrap(facts: Facts, function: cst.FunctionDef) -> dict[cst.CSTNode, edit.Edit]:
    """Edits that make `function` return only the item its callers use, if there is just one."""
    records = facts.calls_of(function)
    if not records or not all(isinstance(r.result, Sequence) for r in records):
        return {}
    wanted: set[int] = set()
    sites: dict[cst.CSTNode, edit.Edit] = {}
    for record in records:
        used = _used_items(facts, record, sites)
        if used is None:
            return {}
        wanted |= used
    if len(wanted) != 1:
        return {}
    index = wanted.pop()
    returns = [n for n in edit.walk(function.body) if isinstance(n, cst.Return)]
    picked = [_item(facts, r.value, index) if r.value is not None else None for r in returns]
    if any(p is None for p in picked):
        return {}
    edits: dict[cst.CSTNode, edit.Edit] = dict(sites)
    for node, item in zip(returns, picked, strict=True):
        assert item is not None
        chosen: cst.BaseExpression = item
        edits[node] = _return(chosen)
    if function.returns is not None:
        edits[function] = lambda updated: updated.with_changes(returns=None)
    return edits


def _return(item: cst.BaseExpression) -> edit.Edit:
    return lambda updated: updated.with_changes(value=item)


def _used_items(facts: Facts, record: CallRecord, sites: dict[cst.CSTNode, edit.Edit]) -> set[int] | None:
    """Which items of the result a call site uses, with the edits that make it use the bare result."""
    result = record.result
    assert isinstance(result, Sequence)
    if record.site is None:  # the entry: the logits
        names = list(result.names)
        return {names.index("logits")} if "logits" in names else {0}
    if not isinstance(record.site, cst.Call):
        return None
    use = _Uses(facts, record.site, result)
    if use.items is None:
        return None
    sites.update(use.edits)
    return use.items


class _Uses:
    """How the value of one call is used: unpacked, indexed, or by a name that is."""

    def __init__(self, facts: Facts, site: cst.Call, result: Sequence) -> None:
        self.facts, self.site, self.result = facts, site, result
        self.edits: dict[cst.CSTNode, edit.Edit] = {}
        self.items: set[int] | None = set()
        parent = edit.parent(facts.program.tree, site)
        self._context(parent, site)

    def _context(self, parent: cst.CSTNode | None, node: cst.CSTNode) -> None:
        if isinstance(parent, cst.Subscript) and parent.value is node:
            self._index(parent)
        elif isinstance(parent, cst.Attribute) and parent.value is node:
            self._field(parent)
        elif isinstance(parent, cst.Assign | cst.AnnAssign):
            self._assigned(parent)
        elif isinstance(parent, cst.Return):
            self._handed_on(parent)
        else:
            self.items = None

    def _handed_on(self, node: cst.Return) -> None:
        """`return f(...)`: the callers of a function that does no more use the result in its place."""
        function = _function_of(self.facts.program.tree, node)
        assert function is not None
        sites = [r.site for r in self.facts.calls_of(function) if r.result is self.result]
        if sum(isinstance(n, cst.Return) for n in edit.walk(function.body)) > 1:
            self.items = None
        for site in sites:
            if self.items is None or not isinstance(site, cst.Call):
                self.items = None
                return
            self._context(edit.parent(self.facts.program.tree, site), site)

    def _index(self, node: cst.Subscript) -> None:
        index = node.slice[0].slice
        text = edit.code(index)
        if self.items is not None and text.lstrip("-").isdigit() and len(node.slice) == 1:
            position = int(text) % max(len(self.result.items), 1)
            self.items.add(position)
            self.edits[node] = lambda updated: updated.value
        elif self._is_empty(node):
            self.edits[node] = edit.replace("[]" if self.result.mutable else "()")
        else:
            self.items = None

    def _is_empty(self, node: cst.Subscript) -> bool:
        """`outputs[1:]` of a result that has but one item."""
        values = self.facts.values(node)
        return bool(values) and all(isinstance(v, Sequence) and not v.items for v in values)

    def _field(self, node: cst.Attribute) -> None:
        if self.items is not None and node.attr.value in self.result.names:
            self.items.add(self.result.names.index(node.attr.value))
            self.edits[node] = lambda updated: updated.value
        else:
            self.items = None

    def _assigned(self, node: cst.Assign | cst.AnnAssign) -> None:
        target = node.targets[0].target if isinstance(node, cst.Assign) else node.target
        if isinstance(node, cst.Assign) and len(node.targets) != 1:
            self.items = None
        elif isinstance(target, cst.Tuple):
            self._unpacked(node, target)
        elif isinstance(target, cst.Name):
            self._named(node, target.value)
        else:
            self.items = None

    def _unpacked(self, node: cst.Assign | cst.AnnAssign, target: cst.Tuple) -> None:
        function = _function_of(self.facts.program.tree, node)
        used = [
            i
            for i, e in enumerate(target.elements)
            if not (isinstance(e.value, cst.Name) and _unread(function, e.value.value, node))
        ]
        if len(used) != 1 or self.items is None:
            self.items = None
            return
        self.items.add(used[0])
        name = target.elements[used[0]].value
        self.edits[target] = lambda _: name

    def _named(self, node: cst.Assign | cst.AnnAssign, name: str) -> None:
        """`outputs = f(...)` followed by `outputs[0]` or `outputs.x` only."""
        function = _function_of(self.facts.program.tree, node)
        if function is None:
            self.items = None
            return
        if isinstance(node, cst.AnnAssign):
            self.edits[node] = lambda updated: cst.Assign([cst.AssignTarget(updated.target)], updated.value)
        for use in [n for n in edit.walk(function.body) if isinstance(n, cst.Name) and n.value == name]:
            values = self.facts.values(use)
            parent = edit.parent(self.facts.program.tree, use)
            if isinstance(parent, cst.AssignTarget) or parent is node:
                continue
            if not any(v is self.result or isinstance(v, Sequence) for v in values):
                continue
            self._context(parent, use)
            if self.items is None:
                return


def _function_of(tree: cst.Module, node: cst.CSTNode) -> cst.FunctionDef | None:
    current: cst.CSTNode | None = node
    while current is not None and not isinstance(current, cst.FunctionDef):
        current = edit.parent(tree, current)
    return current


def _unread(function: cst.FunctionDef | None, name: str, binding: cst.CSTNode) -> bool:
    """Whether a name is never read in a function, other than to be bound again."""
    if function is None:
        return False
    return name not in edit.names_read(function.body)


def _item(facts: Facts, node: cst.BaseExpression, index: int) -> cst.BaseExpression | None:
    """The expression for one item of a returned tuple, record or concatenation."""
    if isinstance(node, cst.Tuple | cst.List):
        plain = all(not isinstance(e, cst.StarredElement) for e in node.elements[: index + 1])
        return node.elements[index].value if index < len(node.elements) and plain else None
    if isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.Add):
        left = facts.values(node.left)
        length = len(left[0].items) if left and isinstance(left[0], Sequence) else 0
        return _item(facts, node.left, index) if index < length else _item(facts, node.right, index - length)
    if isinstance(node, cst.Call):
        return _record_item(facts, node, index)
    return None


def _record_item(facts: Facts, node: cst.Call, index: int) -> cst.BaseExpression | None:
    """The argument of an output class that becomes item `index`; absent ones (None) do not count."""
    values: list[Value] = facts.values(node)
    if not values or not isinstance(values[0], Sequence) or values[0].op != "record":
        return None
    name = values[0].names[index] if index < len(values[0].names) else ""
    for i, arg in enumerate(node.args):
        if arg.keyword is not None and arg.keyword.value == name:
            return arg.value
        if arg.keyword is None and any(v is values[0].items[index] for v in facts.values(arg.value)):
            return node.args[i].value
    return None
