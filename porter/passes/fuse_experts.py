"""Use the runtime's FusedMoE for stacked gated experts that a loop applies one by one."""

from __future__ import annotations

import libcst as cst

from porter.analyze import scalars
from porter.analyze.facts import CallRecord, Facts
from porter.analyze.poly import Poly
from porter.analyze.values import Instance, Layer, Tensor, Value
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

MOE = "porter.runtime.layers.moe"


_BEFORE = """\
import torch
from torch import nn


class OakExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * config.inner_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.inner_size))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        final = torch.zeros_like(hidden_states)
        expert_mask = nn.functional.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in expert_mask.sum(dim=(-1, -2)).nonzero():
            expert_idx = expert_idx[0]
            position, token = torch.where(expert_mask[expert_idx])
            current = hidden_states[token]
            gate, up = nn.functional.linear(current, self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
            current = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert_idx])
            current = current * top_k_weights[token, position, None]
            final.index_add_(0, token, current.to(final.dtype))
        return final


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.top_k
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.router = nn.Linear(config.hidden_size, config.num_experts)
        self.experts = OakExperts(config)

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        weights, chosen = torch.topk(self.router(hidden_states).softmax(dim=-1), self.top_k, dim=-1)
        return self.experts(hidden_states, chosen, weights)
"""
_AFTER = _BEFORE.replace(
    """\
from torch import nn
""",
    """\
from torch import nn
from porter.runtime.layers.moe import FusedMoE
""",
).replace(
    "self.experts = OakExperts(config)",
    "self.experts = FusedMoE(config.num_experts, config.hidden_size, config.inner_size, 'silu')",
)
_UNCHANGED = _BEFORE.replace(
    "current = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert_idx])",
    "current = nn.functional.linear(self.act_fn(gate) * (up + 1), self.down_proj[expert_idx])",
)

_PLAIN = ("self.act_fn = nn.SiLU()", "self.act_fn = nn.functional.silu")


class FuseExperts(Pass):
    """Experts `[E, 2I, H]` and `[E, H, I]` with act(gate) * up, weighted and summed over the chosen ones."""

    stage = Stage.FUSE
    flat = True
    reason = "the loop over experts computes exactly a fused mixture of experts"
    EXAMPLES = (Example(_BEFORE, _AFTER), Example(_BEFORE.replace(*_PLAIN), _AFTER.replace(*_PLAIN)))
    UNCHANGED = (Unchanged(_UNCHANGED, "the experts are not plainly gated: one is added to up"),)

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for name in sorted({n for w in facts.worlds for n in w.classes}):
            info = facts.program.classes[name]
            forward = facts.program.method(info, "forward")
            records = facts.calls_of(forward.node) if forward is not None else []
            texts = {_experts(r) for r in records if isinstance(r.receiver, Instance) and r.receiver.cls is info}
            if len(texts) == 1 and (text := texts.pop()) is not None:
                edits.update(_replace(facts, name, text))
        tree = edit.rewrite(facts.program.tree, edits)
        return edit.add_imports(tree, {MOE: ["FusedMoE"]}) if edits else tree


_FUNCTIONS = frozenset({"silu", "relu", "gelu"})  # which their plain calls compute as the layers of these names do


def _experts(record: CallRecord) -> str | None:
    """The constructor of the fused layer, if the call loops over stacked gated experts and nothing else."""
    instance = record.receiver
    assert isinstance(instance, Instance)
    weights = [v for v in instance.attrs.values() if isinstance(v, Tensor) and v.op == "parameter"]
    inputs = [v for k, v in record.bound.items() if k != "self" and isinstance(v, Tensor)]
    if len(weights) != 2 or len(inputs) != 3 or not isinstance(record.result, Tensor):
        return None
    added = [v for v in record.result.walk(frozenset({i.op for i in inputs})) if v.op == "index_add"]
    activation = _activation(added[0], weights, inputs) if added else None
    shapes = [w.shape for w in weights]
    if activation is None or shapes[0] is None or shapes[1] is None or len(shapes[0]) != 3 or len(shapes[1]) != 3:
        return None
    experts, inter, hidden = shapes[1][0], shapes[1][2], shapes[1][1]
    if shapes[0] != (experts, inter * Poly.const(2), hidden):
        return None
    return f"FusedMoE({experts.text()}, {hidden.text()}, {inter.text()}, {activation})"


def _activation(added: Value, weights: list[Tensor], inputs: list[Tensor]) -> str | None:
    """Follow index_add <- weight * down(act(gate) * up), gate and up being the halves of one product."""
    current = _past_casts(added.args[3]) if len(added.args) > 3 else None
    if current is None or current.op != "mul" or not _from(current.args[1], inputs[2]):
        return None
    down = _past_casts(current.args[0])
    if down.op != "linear" or not _from(down.args[1], weights[1]):
        return None
    gated = _past_casts(down.args[0])
    if gated.op != "mul" or not gated.args[0].args or gated.args[1].op != "piece":
        return None
    gate, up = gated.args[0].args[0], gated.args[1]
    if gate.op != "piece" or gate.args[0] is not up.args[0] or gate.attrs["start"] != Poly.const(0):
        return None
    product = gate.args[0]
    ok = product.op == "linear" and _from(product.args[1], weights[0]) and _from(product.args[0], inputs[0])
    return _name(gated.args[0]) if ok else None


def _name(activated: Value) -> str | None:
    """Source of an activation's name: of a layer that the config chooses, or of a function that the file calls."""
    if activated.op in _FUNCTIONS and len(activated.args) == 1 and not activated.attrs.get("kw"):
        return repr(activated.op)
    layer = activated.args[1] if activated.op == "activation" else None
    if not isinstance(layer, Layer):
        return None
    name = layer.params.get("name")
    return scalars.text(name) if name is not None else "'silu'"


def _past_casts(value: Value) -> Value:
    while value.op in ("to", "type", "float", "type_as"):
        value = value.args[0]
    return value


def _from(value: Value, source: Tensor) -> bool:
    while value is not source and value.op in ("getitem", "to", "row"):
        value = value.args[0]
    return value is source


def _replace(facts: Facts, name: str, text: str) -> dict[cst.CSTNode, edit.Edit]:
    init = facts.program.method(facts.program.classes[name], "__init__")
    assert init is not None
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for node in {r.site for r in facts.calls_of(init.node)}:
        if isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value == name:
            edits[node] = edit.replace(text)
    return edits
