"""Pass `linear_method` from the entry to every layer that can be quantized."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage

TAKES = frozenset(
    {
        "ColumnParallelLinear",
        "RowParallelLinear",
        "ReplicatedLinear",
        "MergedColumnParallelLinear",
        "QKVParallelLinear",
        "VocabParallelEmbedding",
        "ParallelLMHead",
        "FusedMoE",
    }
)
NAME = "linear_method"
_EQUAL = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))


_BEFORE = """\
from torch import nn
from porter.runtime.layers.embedding import VocabParallelEmbedding


class OakForCausalLM(nn.Module):
    def __init__(self, config, linear_method=None):
        super().__init__()
        self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.position_table = nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, input_ids, positions):
        return self.embed(input_ids) + self.position_table(positions)
"""
_AFTER = _BEFORE.replace(
    "self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size)",
    "self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size, linear_method=linear_method)",
)


class ThreadLinearMethod(Pass):
    """Quantization is a choice of the engine, made once and handed down."""

    stage = Stage.FUSE
    flat = True
    reason = "every linear and embedding can be quantized"
    EXAMPLES = (Example(_BEFORE, _AFTER),)

    def apply(self, facts: Facts) -> cst.Module:
        calls = _layer_calls(facts)
        takers = _takers(facts, calls)
        edits: dict[cst.CSTNode, edit.Edit] = dict.fromkeys((c for c in calls if not _passes(c)), _with_argument)
        edits.update({f: _with_param for f in takers if NAME not in {p.name.value for p in edit.params_of(f)}})
        return edit.rewrite(facts.program.tree, edits)


def _layer_calls(facts: Facts) -> list[cst.Call]:
    """Where layers that take `linear_method` are created."""
    return [
        node
        for function in facts.called
        for node in edit.walk(function.body)
        if isinstance(node, cst.Call) and edit.code(node.func) in TAKES
    ]


def _takers(facts: Facts, calls: list[cst.Call]) -> dict[cst.FunctionDef, None]:
    """Functions that create such layers or read the name, and their callers up to the entry; calls join `calls`."""
    entry = facts.program.method(facts.entry, "__init__")
    takers = {entry.node: None} if entry is not None else {}
    readers = [function.body for function in facts.called if NAME in edit.names_read(function.body)]
    todo: list[cst.CSTNode] = [*calls, *readers]
    while todo:
        function = edit.enclosing(facts.program.tree, todo.pop(), cst.FunctionDef)
        if function is None or function in takers:
            continue
        takers[function] = None
        sites = {r.site: None for r in facts.calls_of(function) if isinstance(r.site, cst.Call)}
        calls += sites
        todo += sites
    return takers


def _passes(node: cst.Call) -> bool:
    return any((a.keyword is not None and a.keyword.value == NAME) or edit.code(a.value) == NAME for a in node.args)


def _with_argument(updated: cst.Call) -> cst.Call:
    args = [a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in updated.args]
    return updated.with_changes(args=[*args, cst.Arg(cst.Name(NAME), keyword=cst.Name(NAME), equal=_EQUAL)])


def _with_param(updated: cst.FunctionDef) -> cst.FunctionDef:
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    params = [p.with_changes(comma=comma) for p in updated.params.params]
    params.append(cst.Param(cst.Name(NAME), default=cst.Name("None"), equal=cst.AssignEqual()))
    return updated.with_changes(params=updated.params.with_changes(params=params))
