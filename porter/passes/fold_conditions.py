"""Fold conditions that are settled when the engine calls the model: no labels, no cache object, no training."""

from __future__ import annotations

import builtins
from typing import Any

import libcst as cst

from porter.analyze.facts import Facts
from porter.analyze.statements import always_raises
from porter.analyze.values import ClassRef, Scalar
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

_BEFORE = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids, labels=None):
        hidden_states = self.embed(input_ids)
        if labels is not None:
            return hidden_states.mean()
        return hidden_states.tanh() if self.training else hidden_states
"""
_AFTER = _BEFORE.replace(
    """\
        if labels is not None:
            return hidden_states.mean()
        return hidden_states.tanh() if self.training else hidden_states
""",
    """\
        return hidden_states
""",
)
_ELIF_BEFORE = """\
from torch import nn


class OakEmbedding(nn.Embedding):
    pass


Chosen = None or OakEmbedding


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = Chosen(config.vocab_size, config.hidden_size)

    def forward(self, input_ids, other=None):
        if input_ids is not None and other is not None:
            pass
        elif input_ids is not None:
            hidden_states = self.embed(input_ids)
        else:
            hidden_states = other
        return hidden_states
"""
_ELIF_AFTER = _ELIF_BEFORE.replace("self.embed = Chosen(", "self.embed = OakEmbedding(").replace(
    """\
        if input_ids is not None and other is not None:
            pass
        elif input_ids is not None:
            hidden_states = self.embed(input_ids)
        else:
            hidden_states = other
""",
    """\
        hidden_states = self.embed(input_ids)
""",
)
_UNCHANGED = _BEFORE.replace(
    """\
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
""",
    """\
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.scale = config.scale if config.scale_embeddings else 1.0
""",
).replace(
    """\
    def forward(self, input_ids, labels=None):
        hidden_states = self.embed(input_ids)
        if labels is not None:
            return hidden_states.mean()
        return hidden_states.tanh() if self.training else hidden_states
""",
    """\
    def forward(self, input_ids):
        return self.embed(input_ids) * self.scale
""",
)
_GUARD = _UNCHANGED.replace(
    """\
        self.scale = config.scale if config.scale_embeddings else 1.0
""",
    """\
        if config.scale <= 0:
            raise ValueError(f"scale is {config.scale}")
        self.scale = config.scale
""",
)


class FoldConditions(Pass):
    """A branch that no path takes is not part of inference; a condition that all paths settle alike needs no test.

    Conditions on the config stay branches of the port.
    """

    stage = Stage.STRIP
    reason = "the condition is settled at inference"
    EXAMPLES = (Example(_BEFORE, _AFTER), Example(_ELIF_BEFORE, _ELIF_AFTER))
    UNCHANGED = (
        Unchanged(_UNCHANGED, "the config decides, so the port has to ask it too"),
        Unchanged(_GUARD, "the original refuses such a config, and so does the port"),
    )

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for function in facts.called:
            for node in edit.walk(function.body):
                edits.update(_fold(facts, node, function))
        return edit.rewrite(facts.program.tree, edits)


def _fold(facts: Facts, node: cst.CSTNode, function: cst.FunctionDef) -> dict[cst.CSTNode, edit.Edit]:
    if isinstance(node, cst.If):
        return {} if _is_guard(node, function) else _fold_if(facts, node)
    if isinstance(node, cst.IfExp):
        return _fold_choice(facts, node)
    if isinstance(node, cst.BooleanOperation):
        return _fold_boolean(facts, node)
    if isinstance(node, cst.For) and facts.branches(node) == {False}:
        return {node: edit.remove}
    if isinstance(node, cst.With) and _is_context(node):
        return {node: lambda updated: cst.FlattenSentinel(updated.body.body)}
    if isinstance(node, cst.Assert):
        return {node: edit.remove}
    if isinstance(node, cst.Subscript) or (isinstance(node, cst.Name) and node.value in facts.program.constants):
        return _fold_dispatch(facts, node)
    return {}


def _is_guard(node: cst.If, function: cst.FunctionDef) -> bool:
    """`if config.x not in (...): raise ...` while the model is built: the port refuses those configs too."""
    if function.name.value != "__init__" or not always_raises(node.body) or node.orelse is not None:
        return False
    names = {each.value for each in edit.walk(node.test) if isinstance(each, cst.Name)}
    fields = {each.attr.value for each in edit.walk(node) if isinstance(each, cst.Attribute)}
    read = {each.value for each in edit.walk(node) if isinstance(each, cst.Name)} - fields
    return "config" in names and all(name in ("config", "self") or hasattr(builtins, name) for name in read)


def _fold_dispatch(facts: Facts, node: cst.Subscript | cst.Name) -> dict[cst.CSTNode, edit.Edit]:
    """`ATTENTION_CLASSES[config._attn_implementation]` is one class of the file, and so is a name for one of two."""
    values = facts.values(node)
    names = {v.info.name for v in values if isinstance(v, ClassRef) and v.info is not None}
    if len(names) != 1 or not all(isinstance(v, ClassRef) for v in values):
        return {}
    return {node: edit.replace(names.pop())}


def _is_context(node: cst.With) -> bool:
    text = edit.code(node.items[0].item)
    return any(word in text for word in ("no_grad", "autocast", "set_grad_enabled", "inference_mode"))


def _outcomes(facts: Facts, test: cst.BaseExpression) -> set[bool]:
    """How a test came out over all paths; both if a config field decides it."""
    return facts.branches(test)


def _fold_if(facts: Facts, node: cst.If) -> dict[cst.CSTNode, edit.Edit]:
    if always_raises(node.body) and node.orelse is None:
        return {node: edit.remove}
    outcomes = _outcomes(facts, node.test)
    above = edit.parent(facts.program.tree, node)
    nested = isinstance(above, cst.If) and above.orelse is node
    if outcomes == {False}:
        return {node: lambda updated: _else_part(updated, nested)}
    if always_raises(node.body) and len(outcomes) == 2 and isinstance(node.orelse, cst.Else):
        return {node: lambda updated: _inline(updated.orelse.body, node, nested)}
    last_resort = isinstance(node.orelse, cst.Else) and always_raises(node.orelse.body)
    alike = isinstance(node.orelse, cst.Else) and edit.code(node.body) == edit.code(node.orelse.body)
    if outcomes == {True} or last_resort or alike:
        return {node: lambda updated: _inline(updated.body, node, nested)}
    return {}


def _inline(body: cst.BaseSuite, node: cst.If, nested: bool) -> Any:
    """The statements of a block in place of its `if`; an `elif` becomes the `else` of the one above."""
    if nested:
        return cst.Else(body)
    statements = list(body.body)
    if statements and isinstance(statements[0], cst.SimpleStatementLine | cst.BaseCompoundStatement):
        comments = [line for line in node.leading_lines if line.comment is not None]
        statements[0] = statements[0].with_changes(leading_lines=[*comments, *statements[0].leading_lines])
    return cst.FlattenSentinel(statements)


def _else_part(updated: cst.If, nested: bool) -> Any:
    orelse = updated.orelse
    if orelse is None:
        return cst.RemoveFromParent()
    if nested or isinstance(orelse, cst.If):
        return orelse
    return cst.FlattenSentinel(orelse.body.body)


def _fold_choice(facts: Facts, node: cst.IfExp) -> dict[cst.CSTNode, edit.Edit]:
    outcomes = _outcomes(facts, node.test)
    if outcomes == {True}:
        return {node: lambda updated: edit.parenthesized(updated.body) if node.lpar else updated.body}
    if outcomes == {False}:
        return {node: lambda updated: edit.parenthesized(updated.orelse) if node.lpar else updated.orelse}
    return {}


def _fold_boolean(facts: Facts, node: cst.BooleanOperation) -> dict[cst.CSTNode, edit.Edit]:
    """`a and b` with a settled `a`."""
    outcomes = _outcomes(facts, node.left)
    values = facts.values(node.left)
    if len(outcomes) != 1 or not all(isinstance(v, Scalar) and v.known for v in values):
        return {}
    neutral = isinstance(node.operator, cst.And)
    if outcomes == {neutral}:
        return {node: lambda updated: updated.right}
    return {node: lambda updated: updated.left}
