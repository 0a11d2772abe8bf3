"""Return no more items of a tuple than callers read."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

_BEFORE = """\
from torch import nn


class OakMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.proj(hidden_states), hidden_states.sum(), hidden_states


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mlp = OakMLP(config)

    def forward(self, input_ids):
        hidden_states, total, residual = self.mlp(self.embed(input_ids))
        return hidden_states + residual
"""
_AFTER = _BEFORE.replace(", hidden_states.sum(), hidden_states", ", hidden_states").replace(
    "hidden_states, total, residual =", "hidden_states, residual ="
)
_UNCHANGED = _BEFORE.replace("return hidden_states + residual", "return hidden_states + residual * total")


class DropUnreadItems(Pass):
    """Attention maps and the like, returned between what callers use, are for callers that the engine is not."""

    stage = Stage.STRIP
    reason = "no caller reads this item"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (Unchanged(_UNCHANGED, "the caller reads all three"),)

    def apply(self, facts: Facts) -> cst.Module:
        for function in sorted(facts.called, key=lambda f: f.name.value):
            edits = _narrowed(facts, function)
            if edits:
                return edit.rewrite(facts.program.tree, edits)
        return facts.program.tree


def _narrowed(facts: Facts, function: cst.FunctionDef) -> dict[cst.CSTNode, edit.Edit]:
    """Edits that drop items of returned tuples that no caller reads, where every caller unpacks them into names.

    The first stays: by it a module is compared with the original's.
    """
    returned = [n.value for n in edit.walk(function.body) if isinstance(n, cst.Return)]
    taken = [_names(facts, site) for site in dict.fromkeys(r.site for r in facts.calls_of(function))]
    tuples = [t for t in [*returned, *taken] if isinstance(t, cst.Tuple)]
    sizes = {len(t.elements) for t in tuples}
    if not taken or len(tuples) != len(returned) + len(taken) or len(sizes) != 1:
        return {}
    size = sizes.pop()
    read = {i for i in range(size) for t in taken if isinstance(t, cst.Tuple) and _is_read(facts, t, i)}
    kept = sorted(read | {0})
    if not 1 < len(kept) < size:
        return {}
    edits: dict[cst.CSTNode, edit.Edit] = {t: _only(kept) for t in tuples}
    if function.returns is not None:
        edits[function] = lambda updated: updated.with_changes(returns=None)
    return edits


def _names(facts: Facts, site: cst.CSTNode | None) -> cst.Tuple | None:
    """The names that the result of a call is unpacked into."""
    parent = edit.parent(facts.program.tree, site) if site is not None else None
    target = parent.targets[0].target if isinstance(parent, cst.Assign) and len(parent.targets) == 1 else None
    if not isinstance(target, cst.Tuple) or not all(isinstance(e.value, cst.Name) for e in target.elements):
        return None
    return target


def _is_read(facts: Facts, target: cst.Tuple, index: int) -> bool:
    function = edit.enclosing(facts.program.tree, target, cst.FunctionDef)
    name = target.elements[index].value
    return function is None or not isinstance(name, cst.Name) or name.value in edit.names_read(function.body)


def _only(kept: list[int]) -> edit.Edit:
    def change(updated: cst.Tuple) -> cst.Tuple:
        elements = [updated.elements[i] for i in kept]
        elements[-1] = elements[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return updated.with_changes(elements=elements)

    return change
