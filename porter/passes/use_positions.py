"""Take positions from the engine in place of what the file counts or is given as position_ids."""

from __future__ import annotations

from itertools import takewhile

import libcst as cst

from porter.analyze.counting import counted, counts, place_ids, same_everywhere
from porter.analyze.facts import Facts
from porter.analyze.values import Tensor, Value
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

_BEFORE = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, input_ids, position_ids=None):
        return self.embed(input_ids) + self.embed_positions(position_ids)
"""
_AFTER = _BEFORE.replace(
    """\
    def forward(self, input_ids, position_ids=None):
        return self.embed(input_ids) + self.embed_positions(position_ids)
""",
    """\
    def forward(self, input_ids, positions=None):
        return self.embed(input_ids) + self.embed_positions(positions)
""",
)
_BEFORE_2 = """\
import torch
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, input_ids):
        places = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        return self.embed(input_ids) + self.embed_positions(places + 2)
"""
_AFTER_2 = _BEFORE_2.replace(
    "return self.embed(input_ids) + self.embed_positions(places + 2)",
    "return self.embed(input_ids) + self.embed_positions(positions + 2)",
)
_UNCHANGED = _BEFORE.replace(
    "self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)",
    "self.embed_types = nn.Embedding(config.vocab_size, config.hidden_size)",
).replace(
    """\
    def forward(self, input_ids, position_ids=None):
        return self.embed(input_ids) + self.embed_positions(position_ids)
""",
    """\
    def forward(self, input_ids, positions):
        return self.embed(input_ids) + self.embed_types(input_ids)
""",
)
_SHARED_ROWS = """\
import torch
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, input_ids):
        rows = self.embed_positions(torch.arange(input_ids.shape[1]))[None, None, :, :]
        return self.embed(input_ids) + rows.squeeze(1)
"""
_OWN_ROWS = _SHARED_ROWS.replace("(torch.arange(input_ids.shape[1]))[None, None, :, :]", "(positions)[:, None]")


class UsePositions(Pass):
    """Positions come from the engine, one for each token; nothing counts them from shapes or masks."""

    stage = Stage.ATTEND
    reason = "the engine gives each token's position"
    EXAMPLES = (Example(_BEFORE, _AFTER), Example(_BEFORE_2, _AFTER_2), Example(_SHARED_ROWS, _OWN_ROWS))
    UNCHANGED = (Unchanged(_UNCHANGED, "these ids are no positions"),)

    def apply(self, facts: Facts) -> cst.Module:
        edits = _renames(facts) or _computed(facts) or _counted_apart(facts)
        return edit.rewrite(facts.program.tree, edits)


def _renames(facts: Facts) -> dict[cst.CSTNode, edit.Edit]:
    """Call the argument that holds the positions `positions` wherever it goes."""
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for function in facts.called:
        for param in edit.params_of(function):
            name = param.name.value
            bound = [r.bound[name] for r in facts.calls_of(function) if name in r.bound]
            if name == "positions" or not bound or not all(v.op == "positions" for v in bound):
                continue
            taken = {p.name.value for p in edit.params_of(function)} | edit.names_read(function.body)
            if "positions" in taken or name not in ("position_ids",):
                continue
            edits.update(_rename(facts, function, name))
    return edits


def _rename(facts: Facts, function: cst.FunctionDef, name: str) -> dict[cst.CSTNode, edit.Edit]:
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for node in edit.walk(function):
        if isinstance(node, cst.Name) and node.value == name and not _is_keyword(facts, node):
            edits[node] = edit.replace("positions")
    for record in facts.calls_of(function):
        if isinstance(record.site, cst.Call):
            for arg in record.site.args:
                if arg.keyword is not None and arg.keyword.value == name:
                    edits[arg.keyword] = edit.replace("positions")
    return edits


def _is_keyword(facts: Facts, node: cst.Name) -> bool:
    above = edit.parent(facts.program.tree, node)
    return (isinstance(above, cst.Arg) and above.keyword is node) or (
        isinstance(above, cst.Attribute) and above.attr is node
    )


def _computed(facts: Facts) -> dict[cst.CSTNode, edit.Edit]:
    """Replace position ids that the file counts itself, where an embedding or a table is looked up with them."""
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for function in facts.called:
        for node in edit.walk(function.body):
            ids = _looked_up(facts, node)
            if ids is None:
                continue
            if not _is_zeros(ids) and same_everywhere(facts.values(ids)) == 0:
                edits[ids] = edit.replace("torch.zeros_like(positions)")
                continue
            for inner in edit.walk(ids):
                if isinstance(inner, cst.BaseExpression) and counts(facts.values(inner)):
                    if isinstance(inner, cst.Name) and inner.value == "positions":
                        if "positions" not in {p.name.value for p in edit.params_of(function)}:
                            edits.update(_own_positions(facts, function))
                    else:
                        edits[inner] = edit.replace("positions")
                        edits.update(_with_sequences(facts, facts.values(ids)))
                    break
    return edits


def _with_sequences(facts: Facts, ids: list[Value]) -> dict[cst.CSTNode, edit.Edit]:
    """Where rows that all sequences shared got axes in front: the first is now the axis of the sequences."""
    if any(not isinstance(v, Tensor) or v.shape is None or len(v.shape) != 1 for v in ids):
        return {}
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for node in (n for function in facts.called for n in edit.walk(function.body)):
        if not isinstance(node, cst.Subscript) or not _is_looked_up(facts.values(node.value), ids):
            continue
        items = [edit.code(e.slice) for e in node.slice]
        units = len(list(takewhile(lambda item: item == "None", items)))
        if units and set(items[units:]) <= {":", "..."}:
            edits[node] = _with_index(node, [":", *["None"] * (units - 1)])
    return edits


def _is_looked_up(values: list[Value], ids: list[Value]) -> bool:
    return bool(values) and all(any(i is given for i in place_ids(v) for given in ids) for v in values)


def _with_index(node: cst.Subscript, items: list[str]) -> edit.Edit:
    index = cst.ensure_type(edit.parse(f"x[{', '.join(items)}]"), cst.Subscript).slice
    return lambda updated: cst.ensure_type(updated, cst.Subscript).with_changes(slice=index)


def _counted_apart(facts: Facts) -> dict[cst.CSTNode, edit.Edit]:
    """Positions that are counted in another function than the one that looks them up, from 0 or another number on."""
    ids = [i for values in facts.all_values() for v in values for i in place_ids(v) if _sizes_only(i)]
    behind = {id(v) for value in ids for v in value.walk()} if ids else set()
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for function in facts.called if behind else ():
        _count_in(facts, function.body, behind, edits)
    return edits


def _sizes_only(value: Value) -> bool:
    return isinstance(value, Tensor) and value.sizes_only


def _from_engine(value: Value) -> bool:
    return any(v.op == "positions" for v in value.walk())


def _count_in(facts: Facts, node: cst.CSTNode, behind: set[int], edits: dict[cst.CSTNode, edit.Edit]) -> None:
    """Edit the largest expressions below a node that count."""
    values = facts.values(node) if isinstance(node, cst.Call | cst.BinaryOperation | cst.Subscript) else []
    if values and all(id(v) in behind and v.node is node and not _from_engine(v) for v in values):
        start = counted(values)
        if start is not None:
            code = edit.parse(f"positions + {start}" if start else "positions")
            alone = isinstance(edit.parent(facts.program.tree, node), cst.Arg | cst.Assign | cst.Return)
            edits[node] = lambda _: code if alone else edit.parenthesized(code)
            return
    for child in edit.children(node):
        _count_in(facts, child, behind, edits)


def _own_positions(facts: Facts, function: cst.FunctionDef) -> dict[cst.CSTNode, edit.Edit]:
    """Drop what a function counts under the name `positions` itself."""
    return {
        n: edit.remove
        for n in edit.walk(function.body)
        if isinstance(n, cst.Assign)
        and [edit.code(t) for t in edit.targets(n)] == ["positions"]
        and all(isinstance(v, Tensor) and v.sizes_only for v in facts.values(n.value))
    }


def _looked_up(facts: Facts, node: cst.CSTNode) -> cst.BaseExpression | None:
    """The ids of an embedding call or of an index into a table."""
    values = [v for v in facts.values(node) if isinstance(v, Tensor)]
    if isinstance(node, cst.Call) and node.args and any(v.op == "embedding" for v in values):
        made = [v for v in values if v.op == "embedding"]
        arg = node.args[0].value
        if all(any(v is m.args[0] for v in facts.values(arg)) for m in made):
            return arg
    if isinstance(node, cst.Subscript) and any(v.op == "getitem" for v in values):
        index = node.slice[0].slice
        if isinstance(index, cst.Index) and any(
            isinstance(v, Tensor) and v.sizes_only for v in facts.values(index.value)
        ):
            return index.value
    return None


def _is_zeros(ids: cst.BaseExpression) -> bool:
    return edit.code(ids) == "torch.zeros_like(positions)"
