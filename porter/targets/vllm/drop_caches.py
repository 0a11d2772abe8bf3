"""Drop the caches and the attention metadata from all signatures: vLLM's layers find theirs in its forward context."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.passes import edit
from porter.passes.base import Example
from porter.spec import ModelSpec
from porter.targets.base import TargetPass

NAMES = frozenset({"kv_cache", "kv_caches", "attn_metadata"})
_BUILTINS = frozenset({"enumerate", "len", "range", "zip"})

_BEFORE = """\
from torch import nn


class OakModel(nn.Module):
    def forward(self, input_ids, positions, kv_caches, attn_metadata):
        hidden_states = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            hidden_states = layer(positions, hidden_states, kv_caches[i], attn_metadata)
        return hidden_states
"""
_AFTER = """\
from torch import nn


class OakModel(nn.Module):
    def forward(self, input_ids, positions):
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states)
        return hidden_states
"""


class DropCaches(TargetPass):
    """Parameters and arguments go, and a loop's counter that only chose the cache."""

    reason = "vLLM's attention layers find their caches and metadata themselves"
    EXAMPLES = (Example(_BEFORE, _AFTER),)

    def apply(self, tree: cst.Module, spec: ModelSpec) -> cst.Module:
        after = tree.visit(_Drop())
        assert isinstance(after, cst.Module)
        return after


class _Drop(cst.CSTTransformer):
    def leave_Parameters(self, original_node: cst.Parameters, updated_node: cst.Parameters) -> cst.Parameters:
        kept = [p for p in updated_node.params if p.name.value not in NAMES]
        if len(kept) == len(updated_node.params):
            return updated_node
        return updated_node.with_changes(params=_closed(kept))

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        kept = [a for a in updated_node.args if not edit.names_read(a.value) & NAMES]
        if len(kept) == len(updated_node.args) or edit.code(updated_node.func) in _BUILTINS:
            return updated_node
        return updated_node.with_changes(args=_closed(kept))

    def leave_For(self, original_node: cst.For, updated_node: cst.For) -> cst.For:
        target, loop = updated_node.target, updated_node.iter
        if not isinstance(target, cst.Tuple) or not isinstance(loop, cst.Call) or edit.code(loop.func) != "enumerate":
            return updated_node
        counter = edit.code(target.elements[0].value)
        if not edit.names_read(original_node.body) & NAMES or counter in edit.names_read(updated_node.body):
            return updated_node
        return updated_node.with_changes(target=_bare(target.elements[1].value), iter=loop.args[0].value)


def _bare(node: cst.BaseExpression) -> cst.BaseExpression:
    return node.with_changes(lpar=[], rpar=[]) if isinstance(node, cst.Tuple) else node


def _closed(kept: Sequence[cst.CSTNode]) -> list[cst.CSTNode]:
    """Without the comma that a removed last item leaves."""
    return [*kept[:-1], kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)] if kept else []
