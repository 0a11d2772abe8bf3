"""Give variables of the file another name where theirs is one of the engine's inputs."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

_INPUTS = ("positions", "kv_cache", "kv_caches", "attn_metadata")
_BEFORE = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, input_ids, position_ids=None):
        positions = self.embed_positions(position_ids)
        return self.embed(input_ids) + positions
"""


class FreeNames(Pass):
    """A variable that a function binds itself must not take the name under which the engine's input goes through it."""

    stage = Stage.ATTEND
    first = True
    reason = "the engine's inputs go by this name"
    EXAMPLES = (
        Example(
            _BEFORE,
            _BEFORE.replace("        positions =", "        own_positions =").replace("+ positions", "+ own_positions"),
        ),
    )
    UNCHANGED = (Unchanged(_BEFORE.replace("positions =", "embedded =").replace("+ positions", "+ embedded"), "free"),)

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for function in facts.called:
            given = {p.name.value for p in edit.params_of(function)}
            for name in _bound(function) & set(_INPUTS) - given:
                edits.update(_renamed(facts, function, name))
        return edit.rewrite(facts.program.tree, edits)


def _bound(function: cst.FunctionDef) -> set[str]:
    return {
        target.value
        for node in edit.walk(function.body)
        if isinstance(node, cst.Assign | cst.AnnAssign | cst.AugAssign)
        for target in edit.targets(node)
        if isinstance(target, cst.Name)
    }


def _renamed(facts: Facts, function: cst.FunctionDef, name: str) -> dict[cst.CSTNode, edit.Edit]:
    """Every use of a name as a variable; attributes and keywords of that name are others."""
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for node in edit.walk(function.body):
        if isinstance(node, cst.Name) and node.value == name:
            above = edit.parent(facts.program.tree, node)
            is_other = (isinstance(above, cst.Attribute) and above.attr is node) or (
                isinstance(above, cst.Arg) and above.keyword is node
            )
            if not is_other and any(v.op != "positions" for v in facts.values(node)):
                edits[node] = edit.replace(f"own_{name}")
    return edits
