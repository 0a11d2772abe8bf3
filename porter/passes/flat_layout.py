"""Flat layouts of tensors, and layout operations written for them."""

from __future__ import annotations

from typing import Any

import libcst as cst

from porter.analyze.facts import Facts, line_of
from porter.analyze.poly import BATCH, SEQ, Poly
from porter.analyze.values import ONE, Scalar, Sequence, Shape, Tensor
from porter.errors import Refusal
from porter.passes import edit

LAYOUT = frozenset(
    {
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "permute",
        "expand",
        "broadcast_to",
        "expand_as",
        "view_as",
        "reshape_as",
        "contiguous",
        "getitem",
    }
)


def flat(shape: Shape) -> tuple[Poly | str, ...]:
    """The flat layout of a shape: tokens first, then what is left of the other dims, in order."""
    if not any(s.has_tokens for s in shape):
        return tuple(shape)
    rest: list[Poly | str] = []
    dims = list(shape)
    if dims and dims[0] == ONE and not any(BATCH in s.symbols for s in dims):
        dims = dims[1:]
    for size in dims:
        if not size.has_tokens:
            rest.append(size)
            continue
        left = size.without_tokens()
        if left is None:
            raise ValueError(size.text())
        if left != ONE:
            rest.append(left)
    return ("tokens", *rest)


def apart(shape: Shape | None) -> bool:
    """Whether batch and sequence are separate dims, as the engine does not have them."""
    return shape is not None and any(len(s.symbols & {BATCH, SEQ}) == 1 for s in shape)


def receiver(updated: Any) -> Any:
    """What a layout call or index was applied to."""
    if isinstance(updated, cst.Subscript):
        return updated.value
    if isinstance(updated.func, cst.Attribute) and not is_module(updated.func.value):
        return updated.func.value
    return updated.args[0].value


def is_module(node: cst.BaseExpression) -> bool:
    return edit.code(node) in ("torch", "F", "nn.functional", "torch.nn.functional")


def layout(facts: Facts, node: cst.CSTNode, made: list[Tensor]) -> dict[cst.CSTNode, edit.Edit]:
    pairs = []
    for value in made:
        source = value.args[0]
        if not isinstance(source, Tensor) or source.shape is None or value.shape is None:
            raise _unknown(facts, node, value)
        try:
            pairs.append((flat(source.shape), flat(value.shape)))
        except ValueError as error:
            raise refuse(facts, node, f"the size {error} mixes tokens with other dims") from error
    if all(a == b for a, b in pairs):
        return {node: receiver}
    if all(
        v.op == "expand_as" and b[-len(a) :] == a and "tokens" not in a for v, (a, b) in zip(made, pairs, strict=True)
    ):
        return {}  # the same for every token, whatever the layout of the other
    if any(a == b for a, b in pairs):
        raise refuse(facts, node, "its flat layout depends on the config")
    value = made[0]
    if value.op == "permute":
        return _permuted(facts, node, value, *pairs[0])
    if value.op == "unsqueeze":
        place = _first_difference(*pairs[0])
        return {node: lambda updated: _method(updated, f"unsqueeze({place})")}
    if value.op == "getitem":
        return _indexed(facts, node, value)
    if value.op in ("expand", "broadcast_to") and len(pairs[0][0]) == len(pairs[0][1]):
        return _expanded(facts, node, value)
    return _reshaped(facts, node, value, *pairs[0])


def _first_difference(before: tuple[Any, ...], after: tuple[Any, ...]) -> int:
    for i, (a, b) in enumerate(zip(before, after, strict=False)):
        if a != b:
            return i
    return min(len(before), len(after))


def _method(updated: Any, call: str) -> cst.BaseExpression:
    return edit.parse(f"{edit.code(edit.parenthesized(receiver(updated)))}.{call}")


def _permuted(
    facts: Facts, node: cst.CSTNode, value: Tensor, before: tuple[Any, ...], after: tuple[Any, ...]
) -> dict[cst.CSTNode, edit.Edit]:
    source = value.args[0]
    assert isinstance(source, Tensor) and source.shape is not None
    kept = [i for i in value.attrs["order"] if not source.shape[i].has_tokens]
    ranks = {axis: i + 1 for i, axis in enumerate(sorted(kept))}
    order = [0, *[ranks[axis] for axis in kept]]
    if len(order) != len(after):
        raise refuse(facts, node, "the permutation splits a dim that holds tokens")
    return {node: lambda updated: _method(updated, f"permute({', '.join(map(str, order))})")}


def _reshaped(
    facts: Facts, node: cst.CSTNode, value: Tensor, before: tuple[Any, ...], after: tuple[Any, ...]
) -> dict[cst.CSTNode, edit.Edit]:
    """A view that splits or merges dims of a token."""
    if _rank_agnostic(facts, node, value):
        return {}
    common = _first_difference(before, after)
    if len(after) - common == 1:
        return {node: lambda updated: _method(updated, f"flatten({common - len(before)})")}
    if len(before) - common == 1:
        sizes = _dim_codes(facts, node, value, len(after) - common)
        return {node: lambda updated: _method(updated, f"unflatten(-1, ({', '.join(sizes)}))")}
    sizes = _dim_codes(facts, node, value, len(after) - common)
    merged = f"flatten({common - len(before)})"
    return {node: lambda updated: _method(updated, f"{merged}.unflatten(-1, ({', '.join(sizes)}))")}


def _expanded(facts: Facts, node: cst.CSTNode, value: Tensor) -> dict[cst.CSTNode, edit.Edit]:
    """`x.expand(batch, heads, length, -1)` keeps the tokens and expands what is left of its dims."""
    args = _size_nodes(facts, node)
    assert value.shape is not None
    if len(args) != len(value.shape) or any(isinstance(a, cst.StarredElement) for a in args):
        raise refuse(facts, node, "the sizes of its dims are not written out")
    kept = [_size_code(facts, a) for a, size in zip(args, value.shape, strict=True) if not size.has_tokens]
    return {node: lambda updated: _method(updated, f"expand({', '.join(['-1', *kept])})")}


def _rank_agnostic(facts: Facts, node: cst.CSTNode, value: Tensor) -> bool:
    """A view to `(*x.shape[:-1], ...)`: its leading sizes are the tensor's own, whatever their number."""
    shapes = [a for a in value.args[1:] if isinstance(a, Sequence)]
    if isinstance(node, cst.Call) and len(node.args) == 1 and node.args[0].star == "*":
        shapes = [v for v in facts.values(node.args[0].value) if isinstance(v, Sequence)]
    sizes = shapes[0].items if shapes else value.args[1:]
    tokens = [i for i, s in enumerate(sizes) if isinstance(s, Scalar) and s.size is not None and s.size.has_tokens]
    if shapes:
        return bool(tokens) and max(tokens) < shapes[0].prefix
    return False


def _dim_codes(facts: Facts, node: cst.CSTNode, value: Tensor, count: int) -> list[str]:
    """Source for the last `count` sizes of a view, from its own arguments."""
    assert value.shape is not None
    args = _size_nodes(facts, node)
    if len(args) == len(value.shape) and not any(isinstance(a, cst.StarredElement) for a in args):
        if any(s.has_tokens and s.without_tokens() != ONE for s in value.shape):
            raise refuse(facts, node, "tokens are not its leading dims")
        args = [a for a, size in zip(args, value.shape, strict=True) if not size.has_tokens]
    elif any(s.has_tokens for s in value.shape[-count:]):
        raise refuse(facts, node, "tokens are not its leading dims")
    if len(args) < count or any(isinstance(a, cst.StarredElement) for a in args[-count:]):
        raise refuse(facts, node, "the sizes of its last dims are not written out")
    return [_size_code(facts, a) for a in args[-count:]]


def _size_nodes(facts: Facts, node: cst.CSTNode) -> list[cst.CSTNode]:
    """The sizes that a layout call is given, one by one or in a tuple."""
    assert isinstance(node, cst.Call)
    args: list[cst.CSTNode] = [a.value for a in node.args]
    if isinstance(node.func, cst.Attribute) and is_module(node.func.value):
        args = args[1:]
    if len(args) != 1:
        return args
    inner = args[0]
    if not isinstance(inner, cst.Tuple):
        origin = [v.node for v in facts.values(inner) if isinstance(v, Sequence)]
        inner = origin[0] if origin and isinstance(origin[0], cst.Tuple) else inner
    return [e.value for e in inner.elements] if isinstance(inner, cst.Tuple) else args


def _size_code(facts: Facts, node: cst.CSTNode) -> str:
    return flat_size(facts, node) or edit.code(node)


TOKEN_COUNT = "token_count_of_the_batch"


def flat_size(facts: Facts, node: cst.CSTNode) -> str | None:
    """`x.shape[i]` or `x.size(i)` for the flat layout, if a node is one of a tensor with batch and sequence apart."""
    values = facts.values(node)
    sizes = [v for v in values if isinstance(v, Scalar) and v.op == "size" and v.args]
    if not isinstance(node, cst.Subscript | cst.Call) or not _is_size(node) or not sizes or len(sizes) != len(values):
        return None
    source, index = sizes[0].args
    if not isinstance(source, Tensor) or source.shape is None or not apart(source.shape):
        return None
    assert isinstance(index, Scalar) and isinstance(index.const, int)
    if source.shape[index.const].has_tokens:
        return TOKEN_COUNT
    place = -sum(not s.has_tokens for s in source.shape[index.const :])
    base = edit.code(node).rsplit("[", 1)[0].rsplit(".size(", 1)[0].removesuffix(".shape").removesuffix(".size()")
    return f"{base}.shape[{place}]"


def _is_size(node: cst.Subscript | cst.Call) -> bool:
    if isinstance(node, cst.Subscript):
        return edit.code(node.value).endswith((".shape", ".size()"))
    return isinstance(node.func, cst.Attribute) and node.func.attr.value == "size"


def _indexed(facts: Facts, node: cst.CSTNode, value: Tensor) -> dict[cst.CSTNode, edit.Edit]:
    """`x[:, :, i]`: full slices over batch and sequence become one."""
    assert isinstance(node, cst.Subscript)
    source = value.args[0]
    assert isinstance(source, Tensor) and source.shape is not None
    elements = list(node.slice)
    if any(edit.code(e.slice) == "..." for e in elements):
        taken = sum(edit.code(e.slice) not in ("...", "None") for e in elements)
        last = source.shape[len(source.shape) - taken :]
        if edit.code(elements[0].slice) == "..." and not any(s.has_tokens for s in last):
            return {}
        raise refuse(facts, node, "it indexes around an ellipsis")
    kept: list[str] = []
    dims = list(source.shape)
    tokens_done = False
    for element in elements:
        text = edit.code(element.slice).strip(",")
        if text == "None":
            kept.append("None")
            continue
        size = dims.pop(0)
        if size.has_tokens:
            if text != ":":
                raise refuse(facts, node, "it picks single tokens of a sequence")
            if not tokens_done:
                kept.insert(0, ":")
            tokens_done = True
            continue
        kept.append(text)
    index = ", ".join(kept)
    return {node: lambda updated: edit.parse(f"{edit.code(updated.value)}[{index}]")}


def _unknown(facts: Facts, node: cst.CSTNode, value: Tensor) -> Refusal:
    reasons = [v.attrs["why"] for v in value.walk() if "why" in v.attrs]
    return refuse(facts, node, f"the layout of its input is unknown ({reasons[0] if reasons else value.op})")


def refuse(facts: Facts, node: cst.CSTNode, why: str) -> Refusal:
    code = " ".join(edit.code(node).split())
    return Refusal(
        "",
        line_of(facts.program.tree, node),
        code if len(code) < 90 else code[:87] + "...",
        why,
        "rewrite it for one token at a time, or port this module by hand",
        "P300",
    )
