"""Tell a layer its number where its traits depend on it."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage
from porter.passes.parameters import EQUAL, with_params

INDEX = "layer_idx"
_BEFORE = """\
from torch import nn


class OakBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.scale = config.scales[layer_idx]

    def forward(self, hidden_states):
        return hidden_states * self.scale


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OakBlock(config) for i in range(config.num_layers)])

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states
"""
_AFTER = _BEFORE.replace(
    """\
class OakBlock(nn.Module):
    def __init__(self, config):
""",
    """\
class OakBlock(nn.Module):
    def __init__(self, config, layer_idx):
""",
).replace(
    "self.layers = nn.ModuleList([OakBlock(config) for i in range(config.num_layers)])",
    "self.layers = nn.ModuleList([OakBlock(config, layer_idx=i) for i in range(config.num_layers)])",
)


class ThreadLayerIndex(Pass):
    """A layer whose traits depend on its number is told its number."""

    stage = Stage.ATTEND
    reason = "the layer's traits depend on its number"
    EXAMPLES = (Example(_BEFORE, _AFTER),)

    def apply(self, facts: Facts) -> cst.Module:
        for function in facts.called:
            have = {p.name.value for p in edit.params_of(function)} | {
                t.value
                for n in edit.walk(function.body)
                if isinstance(n, cst.Assign)
                for t in edit.targets(n)
                if isinstance(t, cst.Name)
            }
            if function.name.value != "__init__" or INDEX in have or not _reads_index(function):
                continue
            edits: dict[cst.CSTNode, edit.Edit] = {function: with_params([INDEX])}
            for record in facts.calls_of(function):
                if isinstance(record.site, cst.Call):
                    edits[record.site] = _with_index(_counter(facts, record.site))
            return edit.rewrite(facts.program.tree, edits)
        return facts.program.tree


def _reads_index(function: cst.FunctionDef) -> bool:
    """Whether an __init__ reads the layer's number outside of loops that count it themselves."""
    loops = [n for n in edit.walk(function.body) if isinstance(n, cst.ListComp | cst.GeneratorExp | cst.For)]
    inside = {n for loop in loops for n in edit.walk(loop)}
    return any(isinstance(n, cst.Name) and n.value == INDEX and n not in inside for n in edit.walk(function.body))


def _counter(facts: Facts, site: cst.Call) -> str:
    """The variable that counts layers where a layer is created."""
    loop = edit.enclosing(facts.program.tree, site, cst.ListComp, cst.GeneratorExp)
    if loop is not None and isinstance(loop.for_in.target, cst.Name):
        return str(loop.for_in.target.value)
    return INDEX


def _with_index(name: str) -> edit.Edit:
    def change(updated: cst.Call) -> cst.Call:
        args = [a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in updated.args]
        return updated.with_changes(args=[*args, cst.Arg(cst.Name(name), keyword=cst.Name(INDEX), equal=EQUAL)])

    return change
