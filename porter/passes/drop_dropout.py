"""Replace calls that return their argument at inference, dropout above all, by the argument."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.analyze.values import External, Layer, Tensor
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage

_BEFORE = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, input_ids):
        return nn.functional.dropout(self.drop(self.embed(input_ids)), p=0.1, training=self.training)
"""


class DropDropout(Pass):
    """Dropout is the identity outside training; the value it wraps stays."""

    stage = Stage.STRIP
    reason = "the call is the identity at inference"
    EXAMPLES = (
        Example(
            _BEFORE,
            _BEFORE.replace(
                "nn.functional.dropout(self.drop(self.embed(input_ids)), p=0.1, training=self.training)",
                "self.embed(input_ids)",
            ),
        ),
    )

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for function in facts.called:
            for node in edit.walk(function.body):
                if isinstance(node, cst.Call) and node.args and _is_identity(facts, node):
                    edits[node] = lambda updated: edit.parenthesized(updated.args[0].value)
        return edit.rewrite(facts.program.tree, edits)


def _is_identity(facts: Facts, node: cst.Call) -> bool:
    """A dropout or identity whose result is, on every path, the very value of its first argument."""
    callees, results = facts.values(node.func), facts.values(node)
    inputs = facts.values(node.args[0].value)
    if not results or len(results) != len(inputs):
        return False
    if not all(isinstance(r, Tensor) and r is i for r, i in zip(results, inputs, strict=True)):
        return False
    return all(
        (isinstance(c, Layer) and c.kind in ("dropout", "identity"))
        or (isinstance(c, External) and c.name.endswith(".dropout"))
        for c in callees
    )
