"""Name the config field behind a condition on a tensor that only sometimes exists."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts, World
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage

_BEFORE = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.bias = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        extra = self.bias(hidden_states) if self.config.use_extra else None
        if extra is None:
            return hidden_states
        return hidden_states + extra
"""
_AFTER = _BEFORE.replace(
    "if extra is None:",
    "if not self.config.use_extra:",
)


class NameConditions(Pass):
    """`if alibi is None` is the config's choice, once the tensor itself is the attention layer's business."""

    stage = Stage.ATTEND
    reason = "the condition is a choice of the config"
    EXAMPLES = (Example(_BEFORE, _AFTER),)

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for function in facts.called:
            params = [p.name.value for p in edit.params_of(function)]
            if params[:1] != ["self"] or function.name.value == "__init__":
                continue
            for node in edit.walk(function.body):
                if isinstance(node, cst.If | cst.IfExp) and isinstance(node.test, cst.Comparison):
                    key = _key(facts, node.test)
                    if key is not None:
                        edits[node.test] = edit.replace(key)
        return edit.rewrite(facts.program.tree, edits)


def _key(facts: Facts, test: cst.Comparison) -> str | None:
    """The config condition that a settled test agrees with on every path, as source over self."""
    seen = [(w, next(iter(w.branches[test]))) for w in facts.worlds if len(w.branches.get(test, ())) == 1]
    if len({truth for _, truth in seen}) != 2 or any(len(w.branches.get(test, ())) > 1 for w in facts.worlds):
        return None
    for key in sorted({k for w, _ in seen for k, _ in w.decisions}):
        if not key.startswith("config.") or not all(key in dict(w.decisions) for w, _ in seen):
            continue
        if all(_taken(w, key) is truth for w, truth in seen):
            return f"self.{key}"
        if all(_taken(w, key) is not truth for w, truth in seen):
            return f"not self.{key}" if key.replace(".", "").isidentifier() else None
    return None


def _taken(world: World, key: str) -> bool:
    return dict(world.decisions)[key]
