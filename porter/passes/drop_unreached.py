"""Drop classes, functions, methods, decorators and imports that inference never reaches."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.analyze.program import full_name
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

KEPT_DECORATORS = ("staticmethod", "classmethod", "property")
KEPT_METHODS = ("__init__", "load_weights", "sample", "compute_logits")
PLAIN_BASES = ("Module", "PreTrainedModel", "PretrainedModel", "GradientCheckpointingLayer", "GenerationMixin", "ABC")


_BEFORE = """\
import math

from torch import nn
from transformers import PreTrainedModel


class OakPreTrainedModel(PreTrainedModel):
    def _init_weights(self, module):
        module.weight.data.normal_(std=math.sqrt(0.5))


class OakForCausalLM(OakPreTrainedModel):
    _no_split_modules = ["OakBlock"]

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        return self.embed(input_ids)


class OakForTokenClassification(OakPreTrainedModel):
    def forward(self, input_ids):
        return input_ids
"""
_AFTER = """\

from torch import nn


class OakForCausalLM(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids):
        return self.embed(input_ids)
"""
_UNCHANGED = """\
from torch import nn

SCALE = 2.0


def scaled(x):
    return x * SCALE


class OakEmbedding(nn.Embedding):
    def forward(self, input_ids):
        return scaled(super().forward(input_ids))


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = OakEmbedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids):
        return self.embed(input_ids)
"""


class DropUnreached(Pass):
    """A class that no path of the forward uses is other people's business: task heads, flash variants, base classes."""

    stage = Stage.STRIP
    first = True
    reason = "inference never reaches it"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (Unchanged(_UNCHANGED, "the base class does the work, and a helper and its constant are used"),)

    def apply(self, facts: Facts) -> cst.Module:
        tree = facts.program.tree
        edits: dict[cst.CSTNode, edit.Edit] = {}
        keep = _kept_classes(facts)
        read = _names_read(facts, keep)
        for statement in tree.body:
            edits.update(_top_level(facts, statement, keep, read))
        return edit.rewrite(tree, edits)


def _kept_classes(facts: Facts) -> set[str]:
    """Classes with an instance, and their bases that still contribute a method."""
    used = {name for w in facts.worlds for name in w.classes}
    called = facts.called
    keep = set(used)
    for name in used:
        for base in facts.program.mro(facts.program.classes[name])[1:]:
            if any(m.node in called for m in base.methods.values()):
                keep.add(base.name)
    for function in called:
        for node in edit.walk(function.body):
            if isinstance(node, cst.Name) and node.value in facts.program.classes:
                info = facts.program.classes[node.value]
                if any(m.node in called for m in info.methods.values()):
                    keep.add(node.value)
    return keep


def _names_read(facts: Facts, keep: set[str]) -> set[str]:
    """Names used by the code that stays."""
    called = facts.called
    found: set[str] = set()
    for function in called:
        found |= edit.names_read(function.body) | edit.names_read(function.params)
        if function.returns is not None:
            found |= edit.names_read(function.returns)
    for name in keep:
        info = facts.program.classes[name]
        found |= {n for b in info.node.bases for n in edit.names_read(b)}
        for method in info.methods.values():
            if method.node in called or method.name in KEPT_METHODS:
                found |= edit.names_read(method.node)
        for key, value in info.constants.items():
            if _constant_read(facts, key):
                found |= edit.names_read(value)
    for _ in range(3):
        for name, value in facts.program.constants.items():
            if name in found:
                found |= edit.names_read(value)
    return found


def _constant_read(facts: Facts, name: str) -> bool:
    return name == "weight_rules" or any(n == name for w in facts.worlds for _, n in w.attribute_reads)


def _top_level(
    facts: Facts, statement: cst.BaseStatement | cst.CSTNode, keep: set[str], read: set[str]
) -> dict[cst.CSTNode, edit.Edit]:
    if isinstance(statement, cst.ClassDef):
        if statement.name.value not in keep:
            return {statement: edit.remove}
        return _class(facts, statement, keep)
    if isinstance(statement, cst.FunctionDef):
        if statement not in facts.called and statement.name.value not in read:
            return {statement: edit.remove}
        return _decorators(statement)
    if isinstance(statement, cst.If | cst.Try):
        return {} if _binds(statement) & read else {statement: edit.remove}
    if isinstance(statement, cst.SimpleStatementLine):
        return _line(statement, read)
    return {}


def _binds(statement: cst.CSTNode) -> set[str]:
    """Names that a conditional top-level block defines."""
    found: set[str] = set()
    for node in edit.walk(statement):
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            found.add(node.name.value)
        elif isinstance(node, cst.Assign):
            found |= {t.value for t in edit.targets(node) if isinstance(t, cst.Name)}
    return found


def _line(statement: cst.SimpleStatementLine, read: set[str]) -> dict[cst.CSTNode, edit.Edit]:
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for small in statement.body:
        if isinstance(small, cst.ImportFrom | cst.Import):
            edits.update(_import(small, read))
        elif isinstance(small, cst.Assign | cst.AnnAssign):
            bound = {t.value for t in edit.targets(small) if isinstance(t, cst.Name)}
            if not bound & read:
                edits[small] = edit.remove
        elif isinstance(small, cst.Expr) and not isinstance(small.value, cst.SimpleString | cst.ConcatenatedString):
            edits[small] = edit.remove
    return edits


def _import(node: cst.Import | cst.ImportFrom, read: set[str]) -> dict[cst.CSTNode, edit.Edit]:
    if isinstance(node.names, cst.ImportStar):
        return {node: edit.remove}
    kept = [a for a in node.names if _local(a) in read]
    if not kept:
        return {node: edit.remove}
    if len(kept) == len(node.names):
        return {}
    kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
    return {node: lambda updated: updated.with_changes(names=kept)}


def _local(alias: cst.ImportAlias) -> str:
    if alias.asname is not None and isinstance(alias.asname.name, cst.Name):
        return alias.asname.name.value
    return full_name(alias.name).split(".")[0]


def _class(facts: Facts, node: cst.ClassDef, keep: set[str]) -> dict[cst.CSTNode, edit.Edit]:
    edits: dict[cst.CSTNode, edit.Edit] = {}
    info = facts.program.classes[node.name.value]
    for statement in node.body.body:
        if isinstance(statement, cst.FunctionDef):
            if statement not in facts.called and statement.name.value not in KEPT_METHODS:
                edits[statement] = edit.remove
            else:
                edits.update(_decorators(statement))
        elif isinstance(statement, cst.SimpleStatementLine):
            for small in statement.body:
                bound = {t.value for t in edit.targets(small) if isinstance(t, cst.Name)}
                bare = isinstance(small, cst.AnnAssign) and small.value is None
                if bound and (bare or not any(_constant_read(facts, b) for b in bound)):
                    edits[small] = edit.remove
    bases = _bases(facts, info.bases, keep)
    if node.decorators or bases != list(info.bases):
        edits[node] = lambda updated: updated.with_changes(
            decorators=[], bases=[cst.Arg(edit.parse(b)) for b in bases], lpar=cst.LeftParen(), rpar=cst.RightParen()
        )
    edits.update(_plain_super(facts, node, bases))
    return edits


def _bases(facts: Facts, bases: tuple[str, ...], keep: set[str]) -> list[str]:
    """Bases of a port: those kept, library layers as they are, and nn.Module for the rest."""
    found: list[str] = []
    for base in bases:
        if base in keep or (
            base not in facts.program.classes
            and base.rsplit(".", 1)[-1] not in PLAIN_BASES
            and not base.endswith("PreTrainedModel")
            and "Generation" not in base
        ):
            found.append(base)
    return found or ["nn.Module"]


def _plain_super(facts: Facts, node: cst.ClassDef, bases: list[str]) -> dict[cst.CSTNode, edit.Edit]:
    """`super().__init__(config)` of what is now a plain nn.Module takes no arguments."""
    if bases != ["nn.Module"]:
        return {}
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for inner in edit.walk(node):
        if (isinstance(inner, cst.Call) and edit.code(inner.func) == "super().__init__" and inner.args) or (
            isinstance(inner, cst.Call)
            and edit.code(inner.func).startswith("super(")
            and edit.code(inner.func).endswith(").__init__")
            and edit.code(inner) != "super().__init__()"
        ):
            edits[inner] = edit.replace("super().__init__()")
    return edits


def _decorators(node: cst.FunctionDef) -> dict[cst.CSTNode, edit.Edit]:
    kept = [d for d in node.decorators if edit.code(d.decorator) in KEPT_DECORATORS]
    if len(kept) == len(node.decorators):
        return {}
    return {node: lambda updated: updated.with_changes(decorators=kept)}
