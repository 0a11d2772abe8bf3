"""Ask a layer what it computes in, not how its weight is kept: a quantized weight has another dtype."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.analyze.values import Layer
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

_KEEPS = ("Linear", "ParallelLMHead", "VocabParallelEmbedding")
_BEFORE = """\
from torch import nn
from porter.runtime.layers.linear import ReplicatedLinear


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = ReplicatedLinear(config.hidden_size, config.vocab_size)

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        return self.head(hidden_states.to(self.head.weight.dtype))
"""
_AFTER = _BEFORE.replace("self.head.weight.dtype", "self.head.dtype")
_UNCHANGED = _BEFORE.replace("ReplicatedLinear(config", "nn.Linear(config")


class NameComputeDtype(Pass):
    """The dtype of a weight is asked for to bring activations to it; a quantized weight is no such answer."""

    stage = Stage.FUSE
    reason = "a quantized weight is kept in another dtype than the layer computes in"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (Unchanged(_UNCHANGED, "a layer of torch keeps its weight as it computes"),)

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {
            node.value: edit.replace(edit.code(node.value.value))
            for function in facts.called
            for node in edit.walk(function.body)
            if isinstance(node, cst.Attribute)
            and node.attr.value == "dtype"
            and isinstance(node.value, cst.Attribute)
            and node.value.attr.value == "weight"
            and _keeps_otherwise(facts, node.value.value)
        }
        return edit.rewrite(facts.program.tree, edits)


def _keeps_otherwise(facts: Facts, node: cst.CSTNode) -> bool:
    layers = [v for v in facts.values(node) if isinstance(v, Layer)]
    names = {str(layer.attrs.get("class", "")) for layer in layers}
    return bool(names) and all(name.endswith(_KEEPS) and name != "Linear" for name in names)
