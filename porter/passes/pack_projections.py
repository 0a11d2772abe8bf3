"""Pack the projections of queries, keys and values into one QKVParallelLinear."""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from porter.analyze.facts import Facts, World
from porter.analyze.flows import Flows, heads_meet, layer_of, mixes_features, tensors_behind
from porter.analyze.poly import Poly, product
from porter.analyze.values import Scalar, Tensor, Value
from porter.passes import edit
from porter.passes.attend_layer import LINEAR
from porter.passes.base import Example, Pass, Stage, Unchanged
from porter.passes.creations import assigned_before, creation_parts, creations_of

PACKED = "qkv_proj"


@dataclass(eq=False)
class Trio:
    """q, k and v of one attention call, as the linears that project them from the same input."""

    call: cst.Call
    function: cst.FunctionDef
    linears: list[Tensor]
    names: list[str]


_BEFORE = """\
from torch import nn
from porter.runtime.attention.paged import PagedAttention


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.dim)
        self.k_proj = nn.Linear(config.hidden_size, config.num_heads * config.dim)
        self.v_proj = nn.Linear(config.hidden_size, config.num_heads * config.dim)
        self.attn = PagedAttention(config.num_heads, config.dim, 0.125)

    def forward(self, input_ids, positions, kv_caches, attn_metadata):
        hidden_states = self.embed(input_ids)
        query = self.q_proj(hidden_states)
        key = self.k_proj(hidden_states)
        value = self.v_proj(hidden_states)
        return self.attn(query, key, value, kv_caches[0], attn_metadata)
"""
_AFTER = """\
from torch import nn
from porter.runtime.attention.paged import PagedAttention
from porter.runtime.layers.linear import QKVParallelLinear


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.qkv_proj = QKVParallelLinear(config.hidden_size, config.dim, config.num_heads, bias=True)
        self.attn = PagedAttention(self.qkv_proj.num_heads, config.dim, 0.125, num_kv_heads=self.qkv_proj.num_kv_heads)

    def forward(self, input_ids, positions, kv_caches, attn_metadata):
        hidden_states = self.embed(input_ids)
        query, key, value = self.qkv_proj.split(self.qkv_proj(hidden_states))
        return self.attn(query, key, value, kv_caches[0], attn_metadata)
"""
_UNCHANGED = _BEFORE.replace(
    "key = self.k_proj(hidden_states)",
    "key = self.k_proj(hidden_states.tanh())",
)
_UNCHANGED_WIDER = _BEFORE.replace(
    "nn.Linear(config.hidden_size, config.num_heads * config.dim)\n        self.k_proj",
    "nn.Linear(config.hidden_size, 2 * config.num_heads * config.dim)\n        self.k_proj",
).replace("query = self.q_proj(hidden_states)", "query, gate = self.q_proj(hidden_states).chunk(2, dim=-1)")
_UNCHANGED_VALUES = _BEFORE.replace(", 0.125)", ", 0.125, v_head_dim=config.v_dim)").replace(
    "self.v_proj = nn.Linear(config.hidden_size, config.num_heads * config.dim)",
    "self.v_proj = nn.Linear(config.hidden_size, config.num_heads * config.v_dim)",
)
_UNCHANGED_ORDER = (
    _BEFORE.replace(
        "query = self.q_proj(hidden_states)",
        "query = self.q_proj(hidden_states).unflatten(-1, (config.dim, config.num_heads)).permute(0, 2, 1)",
    )
    .replace("        self.embed =", "        self.config = config\n        self.embed =")
    .replace("(config.dim, config.num_heads))", "(self.config.dim, self.config.num_heads))")
)


class PackProjections(Pass):
    """One matrix product instead of three, split by heads over the ranks; weights load shard by shard."""

    stage = Stage.PACK
    flat = True
    reason = "queries, keys and values are projected together and sharded by heads"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (
        Unchanged(_UNCHANGED, "keys are projected from another input than queries and values"),
        Unchanged(_UNCHANGED_WIDER, "something else is projected with the queries"),
        Unchanged(_UNCHANGED_VALUES, "values have another size than keys"),
        Unchanged(_UNCHANGED_ORDER, "the heads of the queries do not lie one after the other"),
    )

    def apply(self, facts: Facts) -> cst.Module:
        tree = facts.program.tree
        for function in facts.called:
            for node in edit.walk(function.body):
                if not isinstance(node, cst.Call) or not any(v.op == "paged_attention" for v in facts.values(node)):
                    continue
                trio = _trio(facts, node, function)
                edits = _pack(facts, trio) if trio is not None else _local_heads(facts, node, function)
                if edits:
                    return edit.add_imports(edit.rewrite(tree, edits), {LINEAR: ["QKVParallelLinear"]})
        return tree


def _attention(facts: Facts, node: cst.Call) -> list[tuple[World, Tensor]]:
    return [
        (w, v)
        for w in facts.worlds
        for v in w.values.get(node, ())
        if isinstance(v, Tensor) and v.op == "paged_attention"
    ]


def _inputs(value: Tensor) -> list[Tensor]:
    return [a for a in value.args if isinstance(a, Tensor) and a.op != "positions"][:3]


def _linear_behind(value: Value) -> Tensor | None:
    """The one linear that a query, key or value comes from."""
    found = [
        v for v in tensors_behind(value, frozenset({"linear", "embedding", "paged_attention"})) if v.op == "linear"
    ]
    return found[0] if len(found) == 1 else None


def _trio(facts: Facts, node: cst.Call, function: cst.FunctionDef) -> Trio | None:
    """The three linears of a call, if they share their input, sharding by heads is safe, and biases agree."""
    result: Trio | None = None
    for world, value in _attention(facts, node):
        linears = [_linear_behind(v) for v in _inputs(value)]
        if len(linears) != 3 or any(v is None for v in linears):
            return None
        known = [v for v in linears if v is not None]
        layers = [layer_of(v) for v in known]
        if len({id(x) for x in layers}) != 3 or any(x is None or x.kind not in ("linear", "conv1d") for x in layers):
            return None
        if len({id(v.args[0]) for v in known}) != 1:
            return None
        if "v_head_dim" in (getattr(layer_of(value), "params", None) or {}):
            return None  # the packed layer has one size of heads
        if any(_width(q) != v.shape[-1] for q, v in zip(_inputs(value), known, strict=True) if v.shape):
            return None  # something else is projected along
        dim = _head_dim(value)
        if any(mixes_features(q, v, dim) for q, v in zip(_inputs(value), known, strict=True)):
            return None
        if heads_meet(Flows(world), value, dim):
            return None
        names = [x.path.rsplit(".", 1)[-1] for x in layers if x is not None]
        result = Trio(node, function, known, names)
    return result


def _width(value: Tensor) -> Poly | None:
    """Numbers a token."""
    return product(value.shape or ()).without_tokens()


def _head_dim(value: Tensor) -> object:
    layer = layer_of(value)
    dim = layer.params.get("head_dim") if layer is not None else None
    return dim.size if isinstance(dim, Scalar) else None


def _pack(facts: Facts, trio: Trio) -> dict[cst.CSTNode, edit.Edit]:
    init = _init_of(facts, trio.function)
    if init is None:
        return {}
    creations = [creations_of(init, n) for n in trio.names]
    if any(len(c) != 1 for c in creations):
        return {}
    layer = layer_of(trio.linears[0])
    parts = [creation_parts(c[0], layer) for c in creations]
    if len(set(parts)) != 1:
        return {}
    made = _attn_constructors(init)
    if not made:
        return {}
    if layer is not None and layer.kind == "conv1d":
        facts.notes.setdefault("transposed", set()).update(trio.names)
    edits = _packed_forward(facts, trio)
    if not edits:
        return {}
    facts.notes.setdefault("packed", {})[PACKED] = dict(zip(trio.names, "qkv", strict=True))
    edits.update(_packed_init(facts, init, trio, creations, parts[0]))
    return edits


def _init_of(facts: Facts, function: cst.FunctionDef) -> cst.FunctionDef | None:
    info = next((c.function for w in facts.worlds for c in w.calls if c.function.node is function), None)
    method = facts.program.method(info.owner, "__init__") if info is not None and info.owner is not None else None
    return method.node if method is not None else None


def _attn_constructors(init: cst.FunctionDef) -> list[cst.Call]:
    return [
        n for n in edit.walk(init.body) if isinstance(n, cst.Call) and edit.code(n.func).startswith("PagedAttention")
    ]


def _counts(call: cst.Call) -> tuple[str, str, str]:
    """(heads, head size, key-value heads) as the attention's constructor has them."""
    named = {a.keyword.value: edit.code(a.value) for a in call.args if a.keyword is not None}
    plain = [edit.code(a.value) for a in call.args if a.keyword is None]
    return plain[0], plain[1], named.get("num_kv_heads", plain[0])


def _packed_init(
    facts: Facts, init: cst.FunctionDef, trio: Trio, creations: list[list[cst.Call]], parts: tuple[str, str]
) -> dict[cst.CSTNode, edit.Edit]:
    tree = facts.program.tree
    constructor = _attn_constructors(init)
    heads, dim, kv = _counts(constructor[0])
    lines = [edit.enclosing(tree, c[0], cst.SimpleStatementLine) for c in creations]
    order = [n for n in edit.lines(init) if n in lines]
    shared = f", {kv}" if kv != heads else ""
    made = edit.statement(f"self.{PACKED} = QKVParallelLinear({parts[0]}, {dim}, {heads}{shared}, bias={parts[1]})")
    made = made.with_changes(leading_lines=order[0].leading_lines)
    edits: dict[cst.CSTNode, edit.Edit] = dict.fromkeys(order, edit.remove)
    needed = {n.attr.value for n in edit.walk(made) if isinstance(n, cst.Attribute) and edit.code(n.value) == "self"}
    if needed - {PACKED} <= assigned_before(tree, init, creations[trio.names.index(_first(order, lines, trio))][0]):
        edits[order[0]] = lambda _: made
    else:
        last = init.body.body[-1]  # where the attention layer is made: all sizes are set by then
        edits[last] = lambda updated: cst.FlattenSentinel([made, updated])
    for call in constructor:
        edits.update(_local(call, PACKED))
    return edits


def _first(order: list[cst.SimpleStatementLine], lines: list[cst.SimpleStatementLine], trio: Trio) -> str:
    """The projection that __init__ makes first."""
    return trio.names[lines.index(order[0])]


def _local(call: cst.Call, name: str) -> dict[cst.CSTNode, edit.Edit]:
    """Head counts of an attention layer as its rank has them."""
    _heads, _, _kv = _counts(call)
    args = [a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in call.args]
    new = [
        cst.Arg(edit.parse(f"self.{name}.num_heads")),
        *args[1:3],
        cst.Arg(edit.parse(f"self.{name}.num_kv_heads"), keyword=cst.Name("num_kv_heads"), equal=_EQUAL),
    ]
    new += [a for a in args[3:] if a.keyword is None or a.keyword.value != "num_kv_heads"]
    return {call: lambda updated: updated.with_changes(args=new)}


_EQUAL = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))


def _packed_forward(facts: Facts, trio: Trio) -> dict[cst.CSTNode, edit.Edit]:
    """`q, k, v = self.qkv_proj.split(self.qkv_proj(x))` before the first use, names in place of the three calls."""
    tree = facts.program.tree
    calls = [_call_of(facts, trio.function, v) for v in trio.linears]
    if any(c is None for c in calls):
        return {}
    known = [c for c in calls if c is not None]
    lines = [edit.enclosing(tree, c, cst.SimpleStatementLine) for c in known]
    names = [
        _name_for(line, call, default)
        for line, call, default in zip(lines, known, ("query", "key", "value"), strict=True)
    ]
    if len(set(names)) != 3:
        names = ["query", "key", "value"]
    source = edit.code(known[0].args[0].value)
    split = edit.statement(f"{', '.join(names)} = self.{PACKED}.split(self.{PACKED}({source}))")
    first = next(n for n in edit.lines(trio.function) if n in lines)
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for call, name in zip(known, names, strict=True):
        edits[call] = edit.replace(name)
    for line in dict.fromkeys(lines):
        edits[line] = _place(split if line is first else None)
    return edits


def _place(split: cst.SimpleStatementLine | None) -> edit.Edit:
    def change(updated: cst.SimpleStatementLine) -> object:
        small = updated.body[0]
        idle = isinstance(small, cst.Assign) and edit.code(small.targets[0].target) == edit.code(small.value)
        rest = [] if idle else [updated]
        if split is None:
            return cst.FlattenSentinel(rest)
        head = split.with_changes(leading_lines=updated.leading_lines)
        rest = [r.with_changes(leading_lines=[]) for r in rest]
        return cst.FlattenSentinel([head, *rest])

    return change


def _call_of(facts: Facts, function: cst.FunctionDef, linear: Tensor) -> cst.Call | None:
    for node in edit.walk(function.body):
        if isinstance(node, cst.Call) and any(
            layer_of(v) is layer_of(linear) and v.op == "linear" and v.node is node for v in facts.values(node)
        ):
            return node
    return None


def _name_for(line: cst.SimpleStatementLine, call: cst.Call, default: str) -> str:
    small = line.body[0]
    if isinstance(small, cst.Assign) and len(small.targets) == 1 and isinstance(small.targets[0].target, cst.Name):
        return small.targets[0].target.value
    return default


def _local_heads(facts: Facts, node: cst.Call, function: cst.FunctionDef) -> dict[cst.CSTNode, edit.Edit]:
    """For a projection that already holds q, k and v: tell the attention its rank's head counts."""
    init = _init_of(facts, function)
    if init is None:
        return {}
    names = {
        layer.path.rsplit(".", 1)[-1]
        for _, v in _attention(facts, node)
        for q in _inputs(v)
        if (linear := _linear_behind(q)) is not None
        and (layer := layer_of(linear)) is not None
        and layer.kind == "qkv_linear"
    }
    if len(names) != 1:
        return {}
    name = names.pop()
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for call in _attn_constructors(init):
        if _counts(call)[0] != f"self.{name}.num_heads":
            edits.update(_local(call, name))
    return edits
