"""Clean up what other passes leave: `x = x`, slices over all layers, values returned right after they are named."""

from __future__ import annotations

import itertools

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
        self.config = config

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        hidden_states = hidden_states
        for i, layer in enumerate(self.layers[: self.config.num_layers]):
            hidden_states = layer(hidden_states)
        output = hidden_states + 1
        return output
"""
_AFTER = _BEFORE.replace(
    """\
        hidden_states = hidden_states
        for i, layer in enumerate(self.layers[: self.config.num_layers]):
""",
    """\
        for layer in self.layers:
""",
).replace(
    """\
        output = hidden_states + 1
        return output
""",
    """\
        return hidden_states + 1
""",
)
_UNCHANGED_1 = _BEFORE.replace(
    "        self.config = config\n",
    "",
).replace(
    """\
        hidden_states = hidden_states
        for i, layer in enumerate(self.layers[: self.config.num_layers]):
            hidden_states = layer(hidden_states)
        output = hidden_states + 1
        return output
""",
    """\
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states) * i
        return hidden_states
""",
)
_UNCHANGED_2 = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([nn.LayerNorm(config.hidden_size) for _ in range(config.num_layers)])

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states)
        return hidden_states
"""


class TidyStatements(Pass):
    """A reader should not meet statements that do nothing."""

    stage = Stage.STRIP
    reason = "the statement does nothing any more"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (
        Unchanged(_UNCHANGED_1, "the number of the layer is read"),
        Unchanged(_UNCHANGED_2, "the slice leaves a layer out"),
    )

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for function in facts.called:
            edits.update(_returned(function))
            for node in edit.walk(function.body):
                if isinstance(node, cst.Assign) and _is_idle(node):
                    edits[node] = edit.remove
                elif isinstance(node, cst.Subscript) and _is_all_layers(facts, node):
                    edits[node] = lambda updated: updated.value
                elif isinstance(node, cst.For) and _is_bare_enumerate(node):
                    edits[node.iter] = lambda updated: updated.args[0].value
                    edits[node.target] = lambda updated: updated.elements[1].value
        return edit.rewrite(facts.program.tree, edits)


def _is_idle(node: cst.Assign) -> bool:
    return len(node.targets) == 1 and edit.code(node.targets[0].target) == edit.code(node.value).strip("()")


def _is_all_layers(facts: Facts, node: cst.Subscript) -> bool:
    """`self.layers[: config.num_hidden_layers]`: the list has just as many."""
    values, index = facts.values(node.value), node.slice[0].slice
    if not isinstance(index, cst.Slice) or index.lower is not None or index.step is not None or index.upper is None:
        return False
    uppers = {scalars.text(v) for v in facts.values(index.upper)}
    counts = {scalars.text(n) for v in values if isinstance(v, Layer) for n in v.params["items"].args}
    return bool(values) and all(isinstance(v, Layer) and v.kind == "module_list" for v in values) and uppers == counts


def _is_bare_enumerate(node: cst.For) -> bool:
    """`for i, layer in enumerate(layers)` whose number nobody reads."""
    if not (isinstance(node.iter, cst.Call) and edit.code(node.iter.func) == "enumerate" and len(node.iter.args) == 1):
        return False
    target = node.target
    if not isinstance(target, cst.Tuple) or not isinstance(target.elements[0].value, cst.Name):
        return False
    return target.elements[0].value.value not in edit.names_read(node.body)


def _returned(function: cst.FunctionDef) -> dict[cst.CSTNode, edit.Edit]:
    """`x = f(y)` followed by `return x`, and `outputs = f(y)` followed by `x = outputs`."""
    edits: dict[cst.CSTNode, edit.Edit] = {}
    lines = edit.lines(function)
    for line, following in itertools.pairwise(lines):
        first, second = line.body[0], following.body[0]
        if len(line.body) != 1 or len(following.body) != 1 or line in edits:
            continue
        if not isinstance(first, cst.Assign) or len(first.targets) != 1:
            continue
        name = first.targets[0].target
        value = second.value if isinstance(second, cst.Return | cst.Assign) else None
        if not isinstance(name, cst.Name) or not isinstance(value, cst.Name) or value.value != name.value:
            continue
        if edit.count_reads(function.body, name.value) != 1 or not _siblings(function, line, following):
            continue
        edits[line] = edit.remove
        edits[following] = _merged(line, second, first.value)
    return edits


def _merged(line: cst.SimpleStatementLine, second: cst.CSTNode, value: cst.BaseExpression) -> edit.Edit:
    return lambda updated: updated.with_changes(
        leading_lines=line.leading_lines or updated.leading_lines, body=[second.with_changes(value=value)]
    )


def _siblings(function: cst.FunctionDef, first: cst.CSTNode, second: cst.CSTNode) -> bool:
    for node in edit.walk(function):
        if isinstance(node, cst.IndentedBlock) and first in node.body:
            return second in node.body
    return False
