"""Use vLLM's linears, embeddings, norms and activations for the runtime's layers of the same meaning."""

from __future__ import annotations

import libcst as cst

from porter.passes import edit
from porter.passes.base import Example
from porter.spec import ModelSpec
from porter.targets.base import TargetPass
from porter.targets.vllm.imports import EMBEDDING, LAYERS, LINEAR, drop_imports, used

_RUNTIME = "porter.runtime.layers"
SUPPORT = ".support"
# runtime module -> {its name: (vLLM's module, vLLM's name)}
RENAMED = {
    f"{_RUNTIME}.linear": {
        name: (LINEAR, name)
        for name in (
            "ColumnParallelLinear",
            "MergedColumnParallelLinear",
            "QKVParallelLinear",
            "ReplicatedLinear",
            "RowParallelLinear",
        )
    },
    f"{_RUNTIME}.embedding": {name: (EMBEDDING, name) for name in ("ParallelLMHead", "VocabParallelEmbedding")},
    f"{_RUNTIME}.norm": {"RMSNorm": (f"{LAYERS}.layernorm", "RMSNorm")},
    f"{_RUNTIME}.activation": {
        "get_act_fn": (f"{LAYERS}.activation", "get_act_fn"),
        "get_act_and_mul": (SUPPORT, "get_act_and_mul"),
    },
    f"{_RUNTIME}.alibi": {"get_alibi_slopes": (SUPPORT, "get_alibi_slopes")},
    f"{_RUNTIME}.rope": {"get_rope_parameters": (SUPPORT, "get_rope_parameters")},
    f"{_RUNTIME}.moe": {"FusedMoE": (SUPPORT, "Experts")},
}

_BEFORE = """\
from torch import nn
from porter.runtime.layers.norm import RMSNorm
from porter.runtime.layers.linear import MergedColumnParallelLinear
from porter.runtime.layers.activation import get_act_fn


class OakMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=1e-6, unit_offset=True)
        self.gate_up_proj = MergedColumnParallelLinear(config.hidden_size, [config.inner_size] * 2)
        self.act = get_act_fn(config.hidden_act)

    def forward(self, x):
        gate, up = self.gate_up_proj.split(self.gate_up_proj(self.norm(x)))
        return self.act(gate) * up
"""
_AFTER = """\
from torch import nn
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear


class OakMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = GemmaRMSNorm(config.hidden_size, eps=1e-6)
        self.gate_up_proj = MergedColumnParallelLinear(config.hidden_size, [config.inner_size] * 2)
        self.act = get_act_fn(config.hidden_act)

    def forward(self, x):
        gate, up = self.gate_up_proj(self.norm(x)).split(self.gate_up_proj.output_partition_sizes, dim=-1)
        return self.act(gate) * up
"""


class UseLayers(TargetPass):
    """Both vocabularies name these layers alike; the runtime's took their names and meanings from vLLM."""

    reason = "vLLM has this layer"
    EXAMPLES = (Example(_BEFORE, _AFTER),)

    def apply(self, tree: cst.Module, spec: ModelSpec) -> cst.Module:
        read = {module: used(tree, module) for module in RENAMED}
        names = {n: new for module, known in RENAMED.items() for n, new in known.items() if n in read[module]}
        if not names:
            return tree
        walk = _Rename({name: new for name, (_, new) in names.items() if new != name})
        dropped = {name: module for module, known in RENAMED.items() for name in known if name in names}
        after = drop_imports(tree, dropped).visit(walk)
        assert isinstance(after, cst.Module)
        imports: dict[str, list[str]] = {}
        for module, new in names.values():
            if new != "RMSNorm" or walk.plain:
                imports.setdefault(module, []).append(new)
        if walk.offset:
            imports.setdefault(f"{LAYERS}.layernorm", []).append("GemmaRMSNorm")
        return edit.add_imports(after, imports)


class _Rename(cst.CSTTransformer):
    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names
        self.plain = self.offset = False

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        name = edit.code(updated_node.func)
        if name in self.names:
            return updated_node.with_changes(func=cst.Name(self.names[name]))
        if name == "RMSNorm":
            return self._norm(updated_node)
        return _split(updated_node)

    def _norm(self, call: cst.Call) -> cst.Call:
        kept = [a for a in call.args if a.keyword is None or a.keyword.value != "unit_offset"]
        if len(kept) == len(call.args):
            self.plain = True
            return call
        self.offset = True
        kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return call.with_changes(func=cst.Name("GemmaRMSNorm"), args=kept)


def _split(call: cst.Call) -> cst.Call:
    """`layer.split(y)`: vLLM's packed layers say their sizes, and the tensor is split."""
    func = call.func
    if not isinstance(func, cst.Attribute) or func.attr.value != "split" or len(call.args) != 1:
        return call
    layer = edit.code(func.value)
    if call.args[0].keyword is not None or not layer.startswith("self."):
        return call
    value = edit.code(edit.parenthesized(call.args[0].value))
    new = edit.parse(f"{value}.split({layer}.output_partition_sizes, dim=-1)")
    assert isinstance(new, cst.Call)
    return new
