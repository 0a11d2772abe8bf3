"""Drop comments that tell the shapes of a batch, or the outputs that a return no longer has."""

from __future__ import annotations

import re

import libcst as cst

from porter.analyze.facts import Facts
from porter.passes.base import Example, Pass, Stage, Unchanged

_BATCHED = re.compile(
    r"[\[(][^\])]*\b(batch|batch_size|bsz|bs|seq_len|seq_length|q_len|q_length|kv_length)\b[^\])]*[\])]"
)
_LISTED = re.compile(r"#\s*\(?\w+(,\s*\(?\w+\)*)+\s*")

_BEFORE = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        # One norm for all.
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids):
        # [batch_size, seq_length, hidden_size]
        hidden_states = self.norm(self.embed(input_ids))  # (bsz, q_len, hidden)
        return hidden_states  # hidden_states, presents, (attentions)
"""
_AFTER = (
    _BEFORE.replace("        # [batch_size, seq_length, hidden_size]\n", "")
    .replace("  # (bsz, q_len, hidden)", "")
    .replace("  # hidden_states, presents, (attentions)", "")
)
_UNCHANGED = _AFTER.replace("        return", "        # [num_tokens, hidden_size]\n        return")


class DropStaleComments(Pass):
    """A port's tensors are flat, and a comment that says otherwise misleads."""

    stage = Stage.FUSE
    flat = True
    reason = "the comment no longer holds"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (Unchanged(_UNCHANGED, "the shape is that of flat tokens"),)

    def apply(self, facts: Facts) -> cst.Module:
        result = facts.program.tree.visit(_Comments())
        assert isinstance(result, cst.Module)
        return result


class _Comments(cst.CSTTransformer):
    def leave_EmptyLine(
        self, original_node: cst.EmptyLine, updated_node: cst.EmptyLine
    ) -> cst.EmptyLine | cst.RemovalSentinel:
        comment = updated_node.comment
        return cst.RemoveFromParent() if comment is not None and _BATCHED.search(comment.value) else updated_node

    def leave_TrailingWhitespace(
        self, original_node: cst.TrailingWhitespace, updated_node: cst.TrailingWhitespace
    ) -> cst.TrailingWhitespace:
        comment = updated_node.comment
        return _bare(updated_node) if comment is not None and _BATCHED.search(comment.value) else updated_node

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine:
        last, comment = updated_node.body[-1], updated_node.trailing_whitespace.comment
        returns_one = isinstance(last, cst.Return) and not isinstance(last.value, cst.Tuple)
        if not returns_one or comment is None or not _LISTED.fullmatch(comment.value):
            return updated_node
        return updated_node.with_changes(trailing_whitespace=_bare(updated_node.trailing_whitespace))


def _bare(node: cst.TrailingWhitespace) -> cst.TrailingWhitespace:
    return node.with_changes(comment=None, whitespace=cst.SimpleWhitespace(""))
