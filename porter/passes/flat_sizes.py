"""Sizes of batched tensors written for flat ones: features keep their size, batch times sequence is the token count."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.analyze.values import B, S, Scalar, Sequence
from porter.passes import edit

COUNT = "num_tokens"

Edits = dict[cst.CSTNode, edit.Edit]


def unpacked_shape(facts: Facts, node: cst.Assign) -> Edits:
    """`batch, seq, hidden = x.shape` keeps only the sizes that a token has, and their count where it is read."""
    shapes = [v for v in facts.values(node.value) if isinstance(v, Sequence) and v.op in ("shape", "part")]
    target = node.targets[0].target
    assert isinstance(target, cst.Tuple)
    if not shapes or not any(
        isinstance(i, Scalar) and i.size is not None and i.size.has_tokens for i in shapes[0].items
    ):
        return {}
    if shapes[0].op == "part":
        return {node: edit.remove}
    base = edit.code(node.value).removesuffix(".size()").removesuffix(".shape")
    lines = [f"{COUNT} = {base}.shape[0]"] if _is_counted(facts, node) else []
    count = len(shapes[0].items)
    for i, (element, item) in enumerate(zip(target.elements, shapes[0].items, strict=True)):
        name = edit.code(element.value)
        assert isinstance(item, Scalar)
        assert item.size is not None
        if name != "_" and not item.size.has_tokens:
            lines.append(f"{name} = {base}.shape[{i - count}]")
    new = [edit.statement(line).body[0] for line in lines]
    return {node: lambda _: cst.FlattenSentinel(new) if new else cst.RemoveFromParent()}


def _is_counted(facts: Facts, node: cst.Assign) -> bool:
    """Whether a product of batch and sequence is made of names that this statement binds."""
    function = edit.enclosing(facts.program.tree, node, cst.FunctionDef)
    bound = {t.value for t in edit.leaves(node.targets[0].target) if isinstance(t, cst.Name)}
    return function is not None and any(
        isinstance(n, cst.BinaryOperation) and _is_count(facts, n) and edit.names_read(n) & bound
        for n in edit.walk(function.body)
    )


def _is_count(facts: Facts, node: cst.BinaryOperation) -> bool:
    values = facts.values(node)
    return bool(values) and all(isinstance(v, Scalar) and v.size == B * S for v in values)


def token_product(facts: Facts, node: cst.BinaryOperation) -> Edits:
    """`batch * seq` is the number of tokens."""
    if not _is_count(facts, node):
        return {}
    if isinstance(node.left, cst.Name):
        return {node: edit.replace(COUNT)}
    base = _base(node.left)
    return {node: edit.replace(f"{base}.shape[0]")} if base else {}


def _base(node: cst.BaseExpression) -> str:
    """The tensor of which an expression is a size."""
    return edit.code(node).rsplit("[", 1)[0].rsplit(".size(", 1)[0].removesuffix(".shape").removesuffix(".size()")
