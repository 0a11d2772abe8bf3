"""Rewrite tensors of shape [batch, sequence, ...] to flat tokens [num_tokens, ...]."""

from __future__ import annotations

from typing import Any

import libcst as cst

from porter.analyze.facts import Facts, line_of
from porter.analyze.poly import BATCH, SEQ, Poly
from porter.analyze.values import ONE, Scalar, Sequence, Shape, Tensor, Value
from porter.errors import Refusal
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

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
# Where an operation takes its dim when it is not a keyword: method position after the receiver.
DIM_AT = {
    "softmax": 0,
    "log_softmax": 0,
    "mean": 0,
    "sum": 0,
    "max": 0,
    "min": 0,
    "argmax": 0,
    "cumsum": 0,
    "prod": 0,
    "norm": 1,
    "split": 1,
    "chunk": 1,
    "topk": 1,
    "unbind": 0,
    "cat": 0,
    "stack": 0,
    "gather": 0,
    "repeat_interleave": 1,
    "var": 0,
    "std": 0,
    "amax": 0,
    "all": 0,
    "any": 0,
    "logsumexp": 0,
    "sort": 0,
    "split_with_sizes": 1,
    "flip": 0,
}
TOKEN_COUNT = "token_count_of_the_batch"


_BEFORE = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.num_groups = config.num_groups

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        batch, length, width = hidden_states.shape
        groups = hidden_states.view(batch, length, self.num_groups, width // self.num_groups)
        groups = groups.transpose(1, 2).softmax(dim=3).transpose(1, 2)
        return groups.reshape(batch, length, width)
"""
_AFTER = _BEFORE.replace(
    """\
        batch, length, width = hidden_states.shape
        groups = hidden_states.view(batch, length, self.num_groups, width // self.num_groups)
        groups = groups.transpose(1, 2).softmax(dim=3).transpose(1, 2)
        return groups.reshape(batch, length, width)
""",
    """\
        width = hidden_states.shape[-1]
        groups = hidden_states.unflatten(-1, (self.num_groups, width // self.num_groups))
        groups = groups.softmax(dim=-1)
        return groups.flatten(-2)
""",
)
_UNCHANGED = _BEFORE.replace(
    "        self.num_groups = config.num_groups\n",
    "",
).replace(
    """\
        batch, length, width = hidden_states.shape
        groups = hidden_states.view(batch, length, self.num_groups, width // self.num_groups)
        groups = groups.transpose(1, 2).softmax(dim=3).transpose(1, 2)
        return groups.reshape(batch, length, width)
""",
    """\
        return hidden_states / hidden_states.norm(dim=-1, keepdim=True)
""",
)


class FlattenTokens(Pass):
    """The engine runs the tokens of all sequences as one row; what laid out batch and sequence has nothing to do.

    A layout operation goes when the flat layouts before and after it agree; otherwise it is written for the flat
    layout. An operation that mixes tokens is refused.
    """

    stage = Stage.FLATTEN
    reason = "tokens are flat: [num_tokens, ...]"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (Unchanged(_UNCHANGED, "a dim counted from the end is the same dim of a token"),)

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for function in sorted(facts.called, key=lambda f: line_of(facts.program.tree, f)):
            if function.name.value != "__init__":
                for node in edit.walk(function.body):
                    edits.update(_flatten(facts, node))
        return edit.rewrite(facts.program.tree, edits)


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


def _apart(shape: Shape | None) -> bool:
    """Whether batch and sequence are separate dims, as the engine does not have them."""
    return shape is not None and any(len(s.symbols & {BATCH, SEQ}) == 1 for s in shape)


def _flatten(facts: Facts, node: cst.CSTNode) -> dict[cst.CSTNode, edit.Edit]:
    values = facts.values(node)
    if isinstance(node, cst.Assign) and len(node.targets) == 1 and isinstance(node.targets[0].target, cst.Tuple):
        return _unpacked_shape(facts, node)
    if isinstance(node, cst.Subscript | cst.Call):
        sizes = [v for v in values if isinstance(v, Scalar) and v.op == "size" and v.args]
        if sizes and len(sizes) == len(values) and edit.code(node).endswith(("]", ")")) and _is_size(node):
            return _size(facts, node, sizes)
    made = [v for v in values if isinstance(v, Tensor) and v.node is node and v.args]
    pieces = [
        v.items[0]
        for v in values
        if isinstance(v, Sequence)
        and v.op in ("pieces", "record", "tuple")
        and v.items
        and isinstance(v.items[0], Tensor)
        and v.items[0].node is node
    ]
    if made:
        return _operation(facts, node, made)
    if pieces:
        return _dim(facts, node, [p for p in pieces if isinstance(p, Tensor)], "split")
    return {}


def _is_size(node: cst.BaseExpression) -> bool:
    if isinstance(node, cst.Subscript):
        return edit.code(node.value).endswith((".shape", ".size()"))
    return isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute) and node.func.attr.value == "size"


# -- sizes -----------------------------------------------------------------------------------------


def _unpacked_shape(facts: Facts, node: cst.Assign) -> dict[cst.CSTNode, edit.Edit]:
    """`batch, seq, hidden = x.shape` keeps only the sizes that a token has."""
    shapes = [v for v in facts.values(node.value) if isinstance(v, Sequence) and v.op in ("shape", "part")]
    target = node.targets[0].target
    assert isinstance(target, cst.Tuple)
    if not shapes or not any(
        isinstance(i, Scalar) and i.size is not None and i.size.has_tokens for i in shapes[0].items
    ):
        return {}
    code = edit.code(node.value)
    base = code.removesuffix(".size()").removesuffix(".shape")
    if shapes[0].op == "part":
        return {node: lambda _: edit.cst.RemoveFromParent()} if False else _poison(node, target, shapes[0], code)
    lines = []
    count = len(shapes[0].items)
    for i, (element, item) in enumerate(zip(target.elements, shapes[0].items, strict=True)):
        name = edit.code(element.value)
        assert isinstance(item, Scalar) and item.size is not None
        if name != "_" and not item.size.has_tokens:
            lines.append(f"{name} = {base}.shape[{i - count}]")
    new = [edit.statement(line).body[0] for line in lines]
    return {node: lambda _: cst.FlattenSentinel(new) if new else cst.RemoveFromParent()}


def _poison(node: cst.Assign, target: cst.Tuple, shape: Sequence, code: str) -> dict[cst.CSTNode, edit.Edit]:
    """Sizes of a sliced shape: token counts become a name that nothing defines, so that a use is refused."""
    return {node: edit.remove}


def _size(facts: Facts, node: cst.BaseExpression, sizes: list[Scalar]) -> dict[cst.CSTNode, edit.Edit]:
    source = sizes[0].args[0]
    index = sizes[0].args[1]
    if not isinstance(source, Tensor) or source.shape is None or not _apart(source.shape):
        return {}
    assert isinstance(index, Scalar) and isinstance(index.const, int)
    if source.shape[index.const].has_tokens:
        return {node: edit.replace(TOKEN_COUNT)}
    place = index.const - len(source.shape)
    base = edit.code(node).rsplit("[", 1)[0].rsplit(".size(", 1)[0].removesuffix(".shape").removesuffix(".size()")
    return {node: edit.replace(f"{base}.shape[{place}]")}


# -- operations ------------------------------------------------------------------------------------


def _operation(facts: Facts, node: cst.CSTNode, made: list[Tensor]) -> dict[cst.CSTNode, edit.Edit]:
    if all(_is_device_move(v) for v in made):
        return {node: _receiver}
    sources = [v.args[0] for v in made]
    if not any(
        _apart(v.shape) or (isinstance(s, Tensor) and _apart(s.shape)) for v, s in zip(made, sources, strict=True)
    ):
        return {node: _receiver} if all(v.op == "contiguous" for v in made) else {}
    if all(v.op in LAYOUT for v in made):
        return _layout(facts, node, made)
    if made[0].op in ("matmul", "bmm", "einsum", "baddbmm") and not made[0].sizes_only:
        return _product(facts, node, made)
    return _dim(facts, node, made, made[0].op)


def _is_device_move(value: Tensor) -> bool:
    """`x.to(y.device)`: the engine places tensors."""
    return value.op == "to" and all(isinstance(a, Scalar) and a.op == "device" for a in value.args[1:])


def _receiver(updated: Any) -> Any:
    """What a layout call or index was applied to."""
    if isinstance(updated, cst.Subscript):
        return updated.value
    if isinstance(updated.func, cst.Attribute) and not _is_module(updated.func.value):
        return updated.func.value
    return updated.args[0].value


def _is_module(node: cst.BaseExpression) -> bool:
    return edit.code(node) in ("torch", "F", "nn.functional", "torch.nn.functional")


def _layout(facts: Facts, node: cst.CSTNode, made: list[Tensor]) -> dict[cst.CSTNode, edit.Edit]:
    pairs = []
    for value in made:
        source = value.args[0]
        if not isinstance(source, Tensor) or source.shape is None or value.shape is None:
            raise _unknown(facts, node, value)
        try:
            pairs.append((flat(source.shape), flat(value.shape)))
        except ValueError as error:
            raise _refuse(facts, node, f"the size {error} mixes tokens with other dims") from error
    if all(a == b for a, b in pairs):
        return {node: _receiver}
    if any(a == b for a, b in pairs):
        raise _refuse(facts, node, "its flat layout depends on the config")
    value = made[0]
    if value.op == "permute":
        return _permuted(facts, node, value, *pairs[0])
    if value.op == "unsqueeze":
        place = _first_difference(*pairs[0])
        return {node: lambda updated: _method(updated, f"unsqueeze({place})")}
    if value.op == "getitem":
        return _indexed(facts, node, value)
    return _reshaped(facts, node, value, *pairs[0])


def _first_difference(before: tuple[Any, ...], after: tuple[Any, ...]) -> int:
    for i, (a, b) in enumerate(zip(before, after, strict=False)):
        if a != b:
            return i
    return min(len(before), len(after))


def _method(updated: Any, call: str) -> cst.BaseExpression:
    return edit.parse(f"{edit.code(edit.parenthesized(_receiver(updated)))}.{call}")


def _permuted(
    facts: Facts, node: cst.CSTNode, value: Tensor, before: tuple[Any, ...], after: tuple[Any, ...]
) -> dict[cst.CSTNode, edit.Edit]:
    source = value.args[0]
    assert isinstance(source, Tensor) and source.shape is not None
    kept = [i for i in value.attrs["order"] if not source.shape[i].has_tokens]
    ranks = {axis: i + 1 for i, axis in enumerate(sorted(kept))}
    order = [0, *[ranks[axis] for axis in kept]]
    if len(order) != len(after):
        raise _refuse(facts, node, "the permutation splits a dim that holds tokens")
    return {node: lambda updated: _method(updated, f"permute({', '.join(map(str, order))})")}


def _reshaped(
    facts: Facts, node: cst.CSTNode, value: Tensor, before: tuple[Any, ...], after: tuple[Any, ...]
) -> dict[cst.CSTNode, edit.Edit]:
    """A view that splits or merges dims of a token."""
    if _rank_agnostic(value):
        return {}
    common = _first_difference(before, after)
    if len(after) - common == 1:
        return {node: lambda updated: _method(updated, f"flatten({common - len(before)})")}
    if len(before) - common == 1:
        sizes = _dim_codes(facts, node, value, len(after) - common)
        return {node: lambda updated: _method(updated, f"unflatten(-1, ({', '.join(sizes)}))")}
    raise _refuse(facts, node, "it splits and merges dims at once")


def _rank_agnostic(value: Tensor) -> bool:
    """A view to `(*x.shape[:-1], ...)`: its leading sizes are the tensor's own, whatever their number."""
    shapes = [a for a in value.args[1:] if isinstance(a, Sequence)]
    sizes = shapes[0].items if shapes else value.args[1:]
    tokens = [i for i, s in enumerate(sizes) if isinstance(s, Scalar) and s.size is not None and s.size.has_tokens]
    if shapes:
        return bool(tokens) and max(tokens) < shapes[0].prefix
    return False


def _dim_codes(facts: Facts, node: cst.CSTNode, value: Tensor, count: int) -> list[str]:
    """Source for the last `count` sizes of a view, from its own arguments."""
    assert isinstance(node, cst.Call) and value.shape is not None
    args = [a.value for a in node.args]
    if isinstance(node.func, cst.Attribute) and _is_module(node.func.value):
        args = args[1:]
    if len(args) == 1:
        inner: cst.CSTNode = args[0]
        if not isinstance(inner, cst.Tuple):
            origin = [v.node for v in facts.values(args[0]) if isinstance(v, Sequence)]
            inner = origin[0] if origin and isinstance(origin[0], cst.Tuple) else inner
        args = [e.value for e in inner.elements] if isinstance(inner, cst.Tuple) else args
    if len(args) < count or any(isinstance(a, cst.StarredElement) for a in args[-count:]):
        raise _refuse(facts, node, "the sizes of its last dims are not written out")
    if any(s.has_tokens for s in value.shape[-count:]):
        raise _refuse(facts, node, "tokens are not its leading dims")
    return [edit.code(a) for a in args[-count:]]


def _indexed(facts: Facts, node: cst.CSTNode, value: Tensor) -> dict[cst.CSTNode, edit.Edit]:
    """`x[:, :, i]`: full slices over batch and sequence become one."""
    assert isinstance(node, cst.Subscript)
    source = value.args[0]
    assert isinstance(source, Tensor) and source.shape is not None
    elements = list(node.slice)
    if any(edit.code(e.slice) == "..." for e in elements):
        first = elements[0]
        if edit.code(first.slice) == "..." and not any(s.has_tokens for s in source.shape[-(len(elements) - 1) :]):
            return {}
        raise _refuse(facts, node, "it indexes around an ellipsis")
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
                raise _refuse(facts, node, "it picks single tokens of a sequence")
            if not tokens_done:
                kept.insert(0, ":")
            tokens_done = True
            continue
        kept.append(text)
    index = ", ".join(kept)
    return {node: lambda updated: edit.parse(f"{edit.code(updated.value)}[{index}]")}


def _product(facts: Facts, node: cst.CSTNode, made: list[Tensor]) -> dict[cst.CSTNode, edit.Edit]:
    """A matrix product is fine as long as tokens stay rows of its left side."""
    for value in made:
        right = value.args[1]
        if isinstance(right, Tensor) and right.shape is not None and any(s.has_tokens for s in right.shape):
            raise _refuse(facts, node, "it multiplies tokens with tokens outside of attention")
    return {}


def _dim(facts: Facts, node: cst.CSTNode, made: list[Tensor], op: str) -> dict[cst.CSTNode, edit.Edit]:
    """Give an operation along a dim the number of that dim in the flat layout."""
    if not isinstance(node, cst.Call) or made[0].sizes_only:
        return {}
    name = node.func.attr.value if isinstance(node.func, cst.Attribute) else edit.code(node.func)
    if name not in DIM_AT:
        return {}
    is_function = isinstance(node.func, cst.Attribute) and _is_module(node.func.value)
    place = DIM_AT[name] + (1 if is_function else 0)
    arg = next((a for a in node.args if a.keyword is not None and a.keyword.value == "dim"), None)
    if arg is None and place < len(node.args) and all(a.keyword is None for a in node.args[: place + 1]):
        arg = node.args[place]
    source = _tensor_in(made[0])
    if arg is None or source is None or not _apart(source.shape):
        return {}
    number = _number(facts, arg.value)
    if number is None or source.shape is None:
        raise _refuse(facts, node, "its dim is not a known number")
    axis = number % len(source.shape)
    if source.shape[axis].has_tokens:
        raise _refuse(facts, node, "it works along the sequence, which the engine does not have as a dim")
    place_from_end = axis - len(source.shape)
    if any(s.has_tokens for s in source.shape[axis:]):
        place_from_end = -sum(not s.has_tokens for s in source.shape[axis:])
    if place_from_end == number:
        return {}
    return {arg.value: edit.replace(str(place_from_end))}


def _tensor_in(value: Tensor) -> Tensor | None:
    first: Value = value.args[0]
    if isinstance(first, Sequence) and first.items:
        first = first.items[0]
    return first if isinstance(first, Tensor) else None


def _number(facts: Facts, node: cst.BaseExpression) -> int | None:
    values = [v.const for v in facts.values(node) if isinstance(v, Scalar) and v.known]
    return values[0] if values and isinstance(values[0], int) else None


def _unknown(facts: Facts, node: cst.CSTNode, value: Tensor) -> Refusal:
    reasons = [v.attrs["why"] for v in value.walk() if "why" in v.attrs]
    return _refuse(facts, node, f"the layout of its input is unknown ({reasons[0] if reasons else value.op})")


def _refuse(facts: Facts, node: cst.CSTNode, why: str) -> Refusal:
    code = " ".join(edit.code(node).split())
    return Refusal(
        "",
        line_of(facts.program.tree, node),
        code if len(code) < 90 else code[:87] + "...",
        why,
        "rewrite it for one token at a time, or port this module by hand",
    )
