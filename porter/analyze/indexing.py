"""What `base[index]` is: items of sequences and mappings, and the shapes of indexed tensors."""

from __future__ import annotations

from dataclasses import replace

import libcst as cst

from porter.analyze import scalars
from porter.analyze.poly import Poly
from porter.analyze.run import Run
from porter.analyze.transfer import broadcast, build, element
from porter.analyze.values import (
    ONE,
    B,
    Config,
    Layer,
    Mapping,
    Mask,
    Repeated,
    S,
    Scalar,
    Sequence,
    Shape,
    Tensor,
    Value,
    const,
    is_none,
    symbol,
)


def unpack(value: Value, count: int, node: cst.CSTNode) -> list[Value] | None:
    if isinstance(value, Sequence):
        return list(value.items)
    if isinstance(value, Tensor) and value.shape:
        return [item(None, value, const(i), node) for i in range(count)]
    if isinstance(value, Repeated):
        return _even_pieces(value, count, node) if value.op == "split" else [value.item] * count
    if isinstance(value, Value) and value.op == "unknown":
        return [Tensor(op="unknown", args=(value,), attrs=dict(value.attrs)) for _ in range(count)]
    if isinstance(value, Scalar) and not value.known:
        return [symbol(f"{value.text}[{i}]") for i in range(count)]
    return None


def _even_pieces(split: Repeated, count: int, node: cst.CSTNode) -> list[Value]:
    """`a, b = x.split(size)`: that many pieces, one after another, whatever the sizes are called."""
    source, size = split.args
    shape = split.item.shape if isinstance(split.item, Tensor) else None
    if shape is None or not isinstance(size, Scalar) or size.size is None:
        return [split.item] * count
    step, dim = size.size, split.attrs["dim"]
    starts = [step * Poly.const(i) for i in range(count)]
    return [build("piece", (source,), shape, node, dim=dim, start=start, size=step) for start in starts]


def row(value: Tensor, node: cst.CSTNode) -> Tensor:
    return build("row", (value,), value.shape[1:] if value.shape else None, node)


def item(run: Run | None, base: Value, index: Value, node: cst.CSTNode) -> Value:
    """`base[index]` for any value."""
    if isinstance(base, Sequence):
        return sequence_item(base, index)
    if isinstance(base, Mapping):
        return _mapping_item(base, index)
    if isinstance(base, Repeated):
        if isinstance(index, Sequence) and index.op == "slice":
            return base
        return base.item
    if isinstance(base, Layer) and base.kind in ("module_list", "sequential"):
        return item(run, base.params["items"], index, node)
    if isinstance(base, Mask):
        return base
    if isinstance(base, Tensor):
        return build("getitem", (base, index), index_shape(base, index), node)
    if isinstance(base, Scalar | Config):
        return Scalar(
            op="config_item",
            args=(base, index),
            text=f"{scalars.text(base)}[{scalars.text(index)}]",
            size=Poly.symbol(f"{scalars.text(base)}[{scalars.text(index)}]"),
        )
    return Value(op="unknown", args=(base,), attrs={"why": "an item of something not understood"})


def sequence_item(base: Sequence, index: Value) -> Value:
    if isinstance(index, Sequence) and index.op == "slice":
        bounds = [scalars.number(v) if not is_none(v) else None for v in index.items]
        picked = base.items[slice(*bounds)]
        start = bounds[0] or 0
        return Sequence(
            op="part",
            args=(base,),
            items=picked,
            mutable=base.mutable,
            attrs={"slice": tuple(bounds)},
            prefix=min(base.prefix, len(picked)) if start == 0 else 0,
        )
    position = scalars.number(index)
    if position is not None and -len(base.items) <= position < len(base.items):
        return base.items[position]
    if position is None and base.items and not (isinstance(index, Scalar) and index.known):
        return base.items[0]
    return const(None)


def _mapping_item(base: Mapping, index: Value) -> Value:
    if isinstance(index, Scalar) and index.known:
        return base.items.get(index.const, Value(op="unknown", attrs={"why": f"no key {index.const!r}"}))
    values = list(base.items.values())
    if len(values) == 1 and isinstance(values[0], Mask) and values[0].kind == "by_key":
        # filled in a loop over the keys: it holds for each
        return replace(values[0], args=(index, *values[0].args[1:]))
    if values and all(isinstance(v, Mask) for v in values):
        return Mask(
            op="mask_by_key",
            kind="by_key",
            shape=(B, ONE, S, S),
            args=(index, *values),
            attrs={"keys": tuple(base.items)},
        )
    key = scalars.text(index)
    if key in base.items:
        return base.items[key]
    return (
        values[0]
        if len(values) == 1
        else Value(op="select", args=(index, *values), attrs={"keys": tuple(base.items), "why": f"selected by {key}"})
    )


def index_shape(base: Tensor, index: Value) -> Shape | None:
    """Shape of `base[index]` by numpy's rules, for the forms that modeling files use."""
    if base.shape is None:
        return None
    parts = list(index.items) if isinstance(index, Sequence) and index.op == "index" else [index]
    used = sum(_consumes(p) for p in parts)
    shape: list[Poly] = []
    dims = list(base.shape)
    advanced: list[Shape] = []
    place: int | None = None
    for part in parts:
        if isinstance(part, Scalar) and part.const is Ellipsis:
            keep = len(base.shape) - used
            shape += dims[:keep]
            del dims[:keep]
        elif is_none(part):
            shape.append(ONE)
        elif isinstance(part, Sequence) and part.op == "slice":
            if not dims:
                return None
            shape.append(slice_size(dims.pop(0), part))
        elif isinstance(part, Tensor) or (isinstance(part, Sequence) and part.op == "tuple"):
            if not dims:
                return None
            place = len(shape) if place is None else place
            if isinstance(part, Tensor) and part.attrs.get("bool"):
                del dims[: len(part.shape or (ONE,)) - 1]
            dims.pop(0)
            advanced.append(part.shape or () if isinstance(part, Tensor) else (Poly.const(len(part.items)),))
        else:
            if not dims:
                return None
            dims.pop(0)
    if advanced and place is not None:
        found: Shape | None = advanced[0]
        for more in advanced[1:]:
            found = broadcast(found, more) if found is not None else None
        if found is None:
            return None
        shape[place:place] = list(found)
    return (*shape, *dims)


def _consumes(part: Value) -> int:
    if isinstance(part, Scalar) and part.known and (part.const is None or part.const is Ellipsis):
        return 0
    return 1


def slice_size(size: Poly, part: Sequence) -> Poly:
    lower, upper, step = part.items
    if is_none(lower) and is_none(upper) and is_none(step):
        return size
    start = _end(lower, size, Poly.const(0))
    stop = _end(upper, size, size)
    if start is None or stop is None:
        return Poly.symbol(f"slice({scalars.text(lower)}:{scalars.text(upper)})")
    length = stop - start
    pace = scalars.number(step) if not is_none(step) else 1
    if pace and pace > 1:
        first = start.number
        if first is not None and 0 <= first < pace and stop == size:
            length = size  # every pace-th from one of the first: an even share, as sizes divide
        return length.divide(Poly.const(pace)) or length
    if length.number is None and size.number is None and stop.number is not None and stop.number > 0:
        return length
    return length


def _end(value: Value, size: Poly, default: Poly) -> Poly | None:
    if is_none(value):
        return default
    number = element(value)
    if number is None:
        return None
    negative = number.terms and all(c < 0 for _, c in number.terms)
    return size + number if negative else number
