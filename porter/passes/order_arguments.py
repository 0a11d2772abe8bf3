"""Pass arguments by position where they come in the order of the parameters."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.analyze.values import Instance
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

_BEFORE = """\
from torch import nn


class OakMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, residual):
        return self.proj(hidden_states) + residual


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mlp = OakMLP(config)

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        return self.mlp(hidden_states, residual=hidden_states)
"""
_AFTER = _BEFORE.replace(
    "return self.mlp(hidden_states, residual=hidden_states)",
    "return self.mlp(hidden_states, hidden_states)",
)
_UNCHANGED = _BEFORE.replace(
    "return self.mlp(hidden_states, residual=hidden_states)",
    "return self.mlp(residual=hidden_states, hidden_states=hidden_states)",
)


class OrderArguments(Pass):
    """Ports pass tensors by position, as the rest of the runtime does."""

    stage = Stage.FUSE
    flat = True
    reason = "tensors are passed by position"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (Unchanged(_UNCHANGED, "the arguments come in another order than the parameters"),)

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for world in facts.worlds:
            for record in world.calls:
                site = record.site
                if not isinstance(site, cst.Call) or not isinstance(record.receiver, Instance) or site in edits:
                    continue
                if record.function.name != "forward":
                    continue
                params = [p.name.value for p in edit.params_of(record.function.node)][1:]
                named = [a.keyword.value for a in site.args if a.keyword is not None]
                bare = len(site.args) - len(named)
                if named and named == params[bare : bare + len(named)] and not any(a.star for a in site.args):
                    edits[site] = _by_position
        return edit.rewrite(facts.program.tree, edits)


def _by_position(updated: cst.Call) -> cst.Call:
    return updated.with_changes(args=[cst.Arg(a.value) for a in updated.args])
