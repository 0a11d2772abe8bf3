"""Call a function on all tokens at once where the file cuts the sequence into chunks."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.analyze.values import External
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

_BEFORE = """\
from torch import nn
from transformers.pytorch_utils import apply_chunking_to_forward


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.chunk_size = config.chunk_size_feed_forward
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, input_ids):
        return apply_chunking_to_forward(self.feed_forward, self.chunk_size, 1, self.embed(input_ids))

    def feed_forward(self, hidden_states):
        return self.dense(hidden_states)
"""
_CHUNKED = "apply_chunking_to_forward(self.feed_forward, self.chunk_size, 1, self.embed(input_ids))"


class CallWhole(Pass):
    """An MLP computed piece by piece along the sequence gives what it gives at once: it looks at single tokens."""

    stage = Stage.STRIP
    first = True
    reason = "chunking the MLP does not change it"
    EXAMPLES = (Example(_BEFORE, _BEFORE.replace(_CHUNKED, "self.feed_forward(self.embed(input_ids))")),)
    UNCHANGED = (
        Unchanged(_BEFORE.replace(_CHUNKED, "self.feed_forward(self.embed(input_ids))"), "nothing is chunked"),
    )

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for function in facts.called:
            for node in edit.walk(function.body):
                if isinstance(node, cst.Call) and len(node.args) > 3 and _is_chunking(facts, node):
                    edits[node] = _whole
        return edit.rewrite(facts.program.tree, edits)


def _is_chunking(facts: Facts, node: cst.Call) -> bool:
    """A call of the library's helper with its function, chunk size and dim by position."""
    callees = facts.values(node.func)
    plain = all(a.keyword is None and not a.star for a in node.args)
    return plain and bool(callees) and all(_is_helper(c) for c in callees)


def _is_helper(value: object) -> bool:
    return isinstance(value, External) and value.name.endswith(".apply_chunking_to_forward")


def _whole(updated: cst.Call) -> cst.Call:
    return updated.with_changes(func=updated.args[0].value, args=updated.args[3:])
