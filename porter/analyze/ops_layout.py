"""Shapes of layout operations: views, permutations, expansions, splits and joins."""

from __future__ import annotations

from typing import Any

import libcst as cst

from porter.analyze import scalars
from porter.analyze.indexing import item
from porter.analyze.poly import Poly, product
from porter.analyze.transfer import Call, build, rule, shape_of, size_list, size_shape
from porter.analyze.values import ONE, Repeated, Scalar, Sequence, Shape, const


@rule("view", "reshape", "view_as", "reshape_as")
def _view(call: Call) -> Any:
    if call.name.endswith("_as"):
        return shape_of(call.args[1])
    targets = size_list(call.args[1:]) if len(call.args) > 1 else size_list(list(call.kwargs.values()))
    if len(targets) == 1 and isinstance(targets[0], Scalar) and targets[0].op == "dtype":
        return call.shape
    sizes = size_shape(targets)
    return resolve(call.shape, list(sizes)) if sizes is not None else None


def resolve(shape: Shape | None, sizes: list[Poly]) -> Shape | None:
    """Replace the -1 of a view by the size that is left."""
    hole = [i for i, s in enumerate(sizes) if s.number == -1]
    if not hole:
        return tuple(sizes)
    if shape is None:
        return None
    rest = product(s for s in sizes if s.number != -1)
    left = product(shape).divide(rest)
    sizes[hole[0]] = left if left is not None else Poly.symbol(f"({product(shape).text()}) // ({rest.text()})")
    return tuple(sizes)


@rule("transpose", "swapaxes", "swapdims")
def _transpose(call: Call) -> Any:
    shape = call.shape
    first, second = call.number(1, "dim0"), call.number(2, "dim1")
    if shape is None or first is None or second is None:
        return None
    order = list(range(len(shape)))
    a, b = first % len(order), second % len(order)
    order[a], order[b] = order[b], order[a]
    return build("permute", (call.args[0],), tuple(shape[i] for i in order), call.node, order=tuple(order))


@rule("permute")
def _permute(call: Call) -> Any:
    shape = call.shape
    order = [scalars.number(v) for v in size_list(call.args[1:] or list(call.kwargs.values()))]
    if shape is None or any(o is None for o in order):
        return None
    axes = tuple(o % len(shape) for o in order if o is not None)
    return build("permute", (call.args[0],), tuple(shape[i] for i in axes), call.node, order=axes)


@rule("t")
def _t(call: Call) -> Any:
    return build("permute", (call.args[0],), call.shape[::-1] if call.shape else None, call.node, order=(1, 0))


@rule("unsqueeze")
def _unsqueeze(call: Call) -> Any:
    shape, number = call.shape, call.number(1, "dim")
    if shape is None or number is None:
        return None
    place = number % (len(shape) + 1)
    return build("unsqueeze", (call.args[0],), (*shape[:place], ONE, *shape[place:]), call.node, dim=place)


@rule("squeeze")
def _squeeze(call: Call) -> Any:
    shape = call.shape
    if shape is None:
        return None
    number = call.number(1, "dim")
    if number is None:
        return tuple(s for s in shape if s != ONE)
    place = number % len(shape)
    return (*shape[:place], *shape[place + 1 :]) if shape[place] == ONE else shape


@rule("flatten")
def _flatten(call: Call) -> Any:
    shape = call.shape
    first, last = call.number(1, "start_dim", 0), call.number(2, "end_dim", -1)
    if shape is None or first is None or last is None:
        return None
    a, b = first % len(shape), last % len(shape)
    return (*shape[:a], product(shape[a : b + 1]), *shape[b + 1 :])


@rule("unflatten")
def _unflatten(call: Call) -> Any:
    shape, number = call.shape, call.number(1, "dim")
    sizes = size_shape([call.args[2]]) if len(call.args) > 2 else None
    if shape is None or number is None or sizes is None:
        return None
    place = number % len(shape)
    inner = resolve((shape[place],), list(sizes))
    return (*shape[:place], *inner, *shape[place + 1 :]) if inner is not None else None


@rule("expand", "broadcast_to", "expand_as")
def _expand(call: Call) -> Any:
    if call.name == "expand_as":
        return shape_of(call.args[1])
    shape = call.shape
    sizes = size_shape(call.args[1:])
    if shape is None or sizes is None:
        return None
    padded = (ONE,) * (len(sizes) - len(shape)) + tuple(shape)
    return tuple(p if s.number == -1 else s for p, s in zip(padded, sizes, strict=True))


@rule("repeat", "tile")
def _repeat(call: Call) -> Any:
    shape, times = call.shape, size_shape(call.args[1:])
    if shape is None or times is None:
        return None
    padded = (ONE,) * (len(times) - len(shape)) + tuple(shape)
    return tuple(p * t for p, t in zip(padded, times, strict=True))


@rule("repeat_interleave")
def _repeat_interleave(call: Call) -> Any:
    shape, number = call.shape, call.number(2, "dim")
    times = call.get(1, "repeats")
    if shape is None or not isinstance(times, Scalar) or times.size is None:
        return None
    if number is None:
        return (product(shape) * times.size,)
    place = number % len(shape)
    return (*shape[:place], shape[place] * times.size, *shape[place + 1 :])


@rule("split", "split_with_sizes")
def _split(call: Call) -> Any:
    shape, number = call.shape, call.number(2, "dim", 0)
    sizes = call.get(1, "split_size_or_sections") or call.kwargs.get("split_size")
    if shape is None or number is None or sizes is None:
        return None
    place = number % len(shape)
    if isinstance(sizes, Sequence):
        parts = [v.size for v in sizes.items if isinstance(v, Scalar) and v.size is not None]
    elif isinstance(sizes, Scalar) and sizes.size is not None:
        count = shape[place].divide(sizes.size)
        times = count.number if count is not None else None
        if times is None or times.denominator != 1:
            piece = (*shape[:place], sizes.size, *shape[place + 1 :])
            item = build("piece", tuple(call.args), piece, call.node)
            return Repeated(op="split", args=(call.args[0], sizes), item=item, attrs={"count": count, "dim": place})
        parts = [sizes.size] * int(times)
    else:
        return None
    return _pieces(call, shape, place, parts)


@rule("chunk", "tensor_split")
def _chunk(call: Call) -> Any:
    shape, count, number = call.shape, call.number(1, "chunks"), call.number(2, "dim", 0)
    if shape is None or count is None or number is None:
        return None
    place = number % len(shape)
    size = shape[place].divide(Poly.const(count))
    return _pieces(call, shape, place, [size] * count) if size is not None else None


def _pieces(call: Call, shape: Shape, place: int, parts: list[Poly]) -> Sequence:
    items = []
    start = Poly.const(0)
    for size in parts:
        piece = (*shape[:place], size, *shape[place + 1 :])
        items.append(build("piece", (call.args[0],), piece, call.node, dim=place, start=start, size=size))
        start = start + size
    return Sequence(op="pieces", args=tuple(items), items=tuple(items), attrs={"dim": place})


@rule("unbind")
def _unbind(call: Call) -> Any:
    shape, number = call.shape, call.number(1, "dim", 0)
    if shape is None or number is None:
        return None
    place = number % len(shape)
    count = shape[place].number
    if count is None:
        return Repeated(
            op="unbind", item=build("row", (call.args[0],), (*shape[:place], *shape[place + 1 :]), call.node)
        )
    index = [Sequence(op="slice", items=(const(None),) * 3) for _ in range(place)]
    items = tuple(
        item(None, call.args[0], Sequence(op="index", items=(*index, const(i))), call.node or cst.Name("_"))
        for i in range(int(count))
    )
    return Sequence(op="tuple", args=items, items=items)


@rule("cat", "concat", "concatenate")
def _cat(call: Call) -> Any:
    parts = call.args[0]
    number = call.number(1, "dim", 0)
    if isinstance(parts, Repeated):
        return _cat_repeated(parts, number)
    if not isinstance(parts, Sequence) or number is None:
        return None
    shapes = [shape_of(v) for v in parts.items]
    if not shapes or any(s is None for s in shapes):
        return None
    known = [s for s in shapes if s is not None]
    place = number % len(known[0]) if known[0] else 0
    if any(len(s) <= place for s in known):
        return None
    total = Poly.const(0)
    for s in known:
        total = total + s[place]
    return (*known[0][:place], total, *known[0][place + 1 :])


def _cat_repeated(parts: Repeated, number: int | None) -> Shape | None:
    shape, count = shape_of(parts.item), parts.attrs.get("count")
    if not shape or count is None or number is None:
        return None
    place = number % len(shape)
    return (*shape[:place], shape[place] * count, *shape[place + 1 :])


@rule("stack")
def _stack(call: Call) -> Any:
    parts, number = call.args[0], call.number(1, "dim", 0)
    if not isinstance(parts, Sequence) or number is None or not parts.items:
        return None
    shape = shape_of(parts.items[0])
    if shape is None:
        return None
    place = number % (len(shape) + 1)
    return (*shape[:place], Poly.const(len(parts.items)), *shape[place:])


@rule("view_as_complex")
def _view_as_complex(call: Call) -> Any:
    return call.shape[:-1] if call.shape else None


@rule("view_as_real")
def _view_as_real(call: Call) -> Any:
    return (*call.shape, Poly.const(2)) if call.shape is not None else None
