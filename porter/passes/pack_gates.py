"""Pack the gate and up projections of a gated MLP into one MergedColumnParallelLinear."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.analyze.flows import ELEMENTWISE, Flows, all_uses_are, layer_of
from porter.analyze.values import Layer, Scalar, Tensor, Value
from porter.passes import edit
from porter.passes.attend_layer import LINEAR
from porter.passes.base import Example, Pass, Stage, Unchanged
from porter.passes.creations import creation_parts, creations_of
from porter.passes.pack_projections import _init_of

PACKED = "gate_up_proj"
ACTIVATION = "porter.runtime.layers.activation"


_BEFORE = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.gate_proj = nn.Linear(config.hidden_size, config.inner_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.inner_size, bias=False)
        self.down_proj = nn.Linear(config.inner_size, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
"""
_AFTER = """\
from torch import nn
from porter.runtime.layers.activation import get_act_and_mul
from porter.runtime.layers.linear import MergedColumnParallelLinear


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.gate_up_proj = MergedColumnParallelLinear(config.hidden_size, [config.inner_size] * 2, bias=False)
        self.down_proj = nn.Linear(config.inner_size, config.hidden_size, bias=False)
        self.act_fn = get_act_and_mul('silu')

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        return self.down_proj(self.act_fn(self.gate_up_proj(hidden_states)))
"""
_UNCHANGED = _BEFORE.replace(
    "        self.down_proj = nn.Linear(config.inner_size, config.hidden_size, bias=False)\n",
    "",
).replace(
    "return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))",
    "return self.act_fn(self.gate_proj(hidden_states)) * (self.up_proj(hidden_states) + 1)",
)
_NORMED = _BEFORE.replace(
    "        self.act_fn", "        self.norm = nn.LayerNorm(config.inner_size)\n        self.act_fn"
).replace(
    "self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))",
    "self.down_proj(self.norm(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)))",
)


class PackGates(Pass):
    """`act(gate(x)) * up(x)` is one matrix product and one elementwise kernel."""

    stage = Stage.PACK
    flat = True
    reason = "gate and up are projected together; activation and product are one operation"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (
        Unchanged(_UNCHANGED, "something is added between the projection and the product"),
        Unchanged(_NORMED, "a norm over the product needs all of it, and a rank would have only its share"),
    )

    def apply(self, facts: Facts) -> cst.Module:
        for function in facts.called:
            for node in edit.walk(function.body):
                if isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.Multiply):
                    edits = _pack(facts, function, node)
                    if edits:
                        return edit.add_imports(
                            edit.rewrite(facts.program.tree, edits),
                            {LINEAR: ["MergedColumnParallelLinear"], ACTIVATION: ["get_act_and_mul"]},
                        )
        return facts.program.tree


def _gated(value: Value) -> tuple[Tensor, Tensor, Tensor] | None:
    """(activated, gate, up) of `act(gate) * up`, whichever side is written first."""
    if value.op != "mul" or len(value.args) < 2:
        return None
    for activated, up in (value.args[:2], value.args[1::-1]):
        if activated.op in ("activation", "silu", "gelu", "relu") and isinstance(activated, Tensor):
            gate = activated.args[0]
            if (
                gate.op == "linear"
                and up.op == "linear"
                and isinstance(gate, Tensor)
                and isinstance(up, Tensor)
                and gate.args[0] is up.args[0]
            ):
                return activated, gate, up
    return None


def _pack(facts: Facts, function: cst.FunctionDef, node: cst.BinaryOperation) -> dict[cst.CSTNode, edit.Edit]:
    parts = [_gated(v) for v in facts.values(node)]
    if not parts or any(p is None for p in parts) or not _only_use(facts, node):
        return {}
    activated, gate, up = parts[0]  # type: ignore[misc]
    init = _init_of(facts, function)
    gate_layer, up_layer = layer_of(gate), layer_of(up)
    if init is None or gate_layer is None or up_layer is None or gate_layer.kind != "linear":
        return {}
    names = [layer.path.rsplit(".", 1)[-1] for layer in (gate_layer, up_layer)]
    creations = [creations_of(init, n) for n in names]
    if any(len(c) != 1 for c in creations):
        return {}
    made = [_parts(c[0], layer) for c, layer in zip(creations, (gate_layer, up_layer), strict=True)]
    if made[0] != made[1]:
        return {}
    source = _source(facts, function, gate)
    activation = _activation(facts, init, activated)
    if source is None or activation is None:
        return {}
    facts.notes.setdefault("packed", {})[PACKED] = {names[0]: 0, names[1]: 1}
    return _edits(facts, init, node, creations, made[0], source, activation)


def _only_use(facts: Facts, node: cst.BinaryOperation) -> bool:
    """Whether gate and up are used for nothing but this product, and it for linears: a rank has its share alone."""
    for world in facts.worlds:
        flows = Flows(world)
        ends = {id(v) for v in flows.linears()}
        for value in world.values.get(node, ()):
            found = _gated(value)
            if found is None:
                return False
            if not isinstance(value, Tensor) or not all_uses_are(flows, value, ELEMENTWISE, ends):
                return False
            activated, gate, up = found
            if any(len({id(u) for u in flows.uses[id(v)]}) != 1 for v in (activated, gate, up)):
                return False
    return True


def _parts(creation: cst.Call, layer: Layer) -> tuple[str, str, str]:
    inputs, bias = creation_parts(creation, layer)
    named = {a.keyword.value: edit.code(a.value) for a in creation.args if a.keyword is not None}
    plain = [edit.code(a.value) for a in creation.args if a.keyword is None]
    return inputs, named.get("out_features", plain[1] if len(plain) > 1 else ""), bias


def _source(facts: Facts, function: cst.FunctionDef, gate: Tensor) -> str | None:
    """The expression that both projections read."""
    for node in edit.walk(function.body):
        if (
            isinstance(node, cst.Call)
            and node.args
            and any(v.op == "linear" and layer_of(v) is layer_of(gate) for v in facts.values(node))
        ):
            return edit.code(node.args[0].value)
    return None


def _activation(facts: Facts, init: cst.FunctionDef, activated: Tensor) -> tuple[str, str, cst.Call | None] | None:
    """(attribute, name expression, its creation) of the activation."""
    layer = activated.args[1] if len(activated.args) > 1 else None
    if activated.op != "activation" or not isinstance(layer, Layer):
        return "act_fn", repr(activated.op), None
    for node in edit.walk(init.body):
        if isinstance(node, cst.Assign) and any(v is layer for v in facts.values(node.value)):
            target = edit.targets(node)[0]
            if isinstance(target, cst.Attribute):
                return target.attr.value, _activation_name(node.value, layer), node.value  # type: ignore[return-value]
    return None


def _activation_name(node: cst.BaseExpression, layer: Layer) -> str:
    """The activation's name as source: what indexes ACT2FN, or the name of an nn.Module."""
    if isinstance(node, cst.Subscript):
        return edit.code(node.slice[0].slice)
    if isinstance(node, cst.Call) and node.args:
        return edit.code(node.args[0].value)
    name = layer.params.get("name")
    return repr(name.const) if isinstance(name, Scalar) and name.known else "'silu'"


def _edits(
    facts: Facts,
    init: cst.FunctionDef,
    node: cst.BinaryOperation,
    creations: list[list[cst.Call]],
    made: tuple[str, str, str],
    source: str,
    activation: tuple[str, str, cst.Call | None],
) -> dict[cst.CSTNode, edit.Edit]:
    tree = facts.program.tree
    inputs, outputs, bias = made
    attribute, name, creation = activation
    lines = [edit.enclosing(tree, c[0], cst.SimpleStatementLine) for c in creations]
    order = [n for n in edit.lines(init) if n in lines]
    merged = f"self.{PACKED} = MergedColumnParallelLinear({inputs}, [{outputs}] * 2, bias={bias})"
    new = [edit.statement(merged).with_changes(leading_lines=order[0].leading_lines)]
    if creation is None:
        new.append(edit.statement(f"self.{attribute} = get_act_and_mul({name})"))
    edits: dict[cst.CSTNode, edit.Edit] = dict.fromkeys(order, edit.remove)
    edits[order[0]] = lambda _: cst.FlattenSentinel(new)
    if creation is not None:
        edits[creation] = edit.replace(f"get_act_and_mul({name})")
    edits[node] = edit.replace(f"self.{attribute}(self.{PACKED}({source}))")
    return edits
