"""Loop over the layers alone, where a zip carries along placeholders that nobody reads."""

from __future__ import annotations

import libcst as cst

from porter.analyze import scalars
from porter.analyze.facts import Facts
from porter.analyze.values import Layer
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

_BEFORE = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([nn.LayerNorm(config.hidden_size) for _ in range(config.num_layers)])

    def forward(self, input_ids):
        past_key_values = tuple([None] * len(self.layers))
        hidden_states = self.embed(input_ids)
        for i, (layer, past) in enumerate(zip(self.layers, past_key_values)):
            hidden_states = layer(hidden_states) * i
        return hidden_states
"""
_AFTER = _BEFORE.replace(
    "for i, (layer, past) in enumerate(zip(self.layers, past_key_values)):", "for i, layer in enumerate(self.layers):"
)
_UNCHANGED = _BEFORE.replace("len(self.layers))", "config.num_passes)").replace("config.num_passes", "2")


class PlainLoops(Pass):
    """A cache that is not there needs no place in the loop; zip stops at the shortest, so lengths must be equal."""

    stage = Stage.STRIP
    reason = "nothing reads what the loop carries along"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (Unchanged(_UNCHANGED, "the zip stops after two layers"),)

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for function in facts.called:
            for node in edit.walk(function.body):
                if isinstance(node, cst.For):
                    edits.update(_plain(facts, function, node))
        return edit.rewrite(facts.program.tree, edits)


def _plain(facts: Facts, function: cst.FunctionDef, loop: cst.For) -> dict[cst.CSTNode, edit.Edit]:
    zipped, target = _zip_of(loop)
    if zipped is None or target is None or len(zipped.args) != 2:
        return {}
    layers, other = (arg.value for arg in zipped.args)
    kept, unread = (element.value for element in target.elements)
    if not isinstance(unread, cst.Name) or edit.count_reads(function.body, unread.value) != 1:  # the target itself
        return {}
    if not isinstance(other, cst.Name) or not _as_many(facts, layers, _made(function, other.value)):
        return {}
    return {zipped: lambda updated: updated.args[0].value, target: lambda _: kept}


def _zip_of(loop: cst.For) -> tuple[cst.Call | None, cst.Tuple | None]:
    """`zip(...)` and the names for its items, also below an enumerate."""
    call: cst.BaseExpression = loop.iter
    target: cst.BaseExpression = loop.target
    if _calls(call, "enumerate") and isinstance(target, cst.Tuple) and len(target.elements) == 2:
        assert isinstance(call, cst.Call)
        call, target = call.args[0].value, target.elements[1].value
    if isinstance(call, cst.Call) and _calls(call, "zip") and isinstance(target, cst.Tuple):
        return call, target if len(target.elements) == 2 else None
    return None, None


def _calls(node: cst.BaseExpression, name: str) -> bool:
    return isinstance(node, cst.Call) and edit.code(node.func) == name and bool(node.args)


def _made(function: cst.FunctionDef, name: str) -> cst.BaseExpression | None:
    """The one value that a function gives to a name, without `tuple(...)` or `list(...)` around it."""
    found = [
        node.value
        for node in edit.walk(function.body)
        if isinstance(node, cst.Assign) and name in {edit.code(t) for t in edit.targets(node)}
    ]
    if len(found) != 1:
        return None
    value = found[0]
    return value.args[0].value if isinstance(value, cst.Call) and edit.code(value.func) in ("tuple", "list") else value


def _as_many(facts: Facts, layers: cst.BaseExpression, made: cst.BaseExpression | None) -> bool:
    """Whether `made` is `[x] * n` with n the number of layers on every path."""
    if not (isinstance(made, cst.BinaryOperation) and isinstance(made.left, cst.List) and len(made.left.elements) == 1):
        return False
    values = facts.values(layers)
    if not values or not all(isinstance(v, Layer) for v in values):
        return False
    counts = {scalars.text(n) for v in values if isinstance(v, Layer) for n in v.params["items"].args}
    turns = {scalars.text(v) for v in facts.values(made.right)}
    return edit.code(made.right) == f"len({edit.code(layers)})" or (len(counts) == 1 and turns == counts)
