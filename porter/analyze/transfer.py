"""What a transfer function is: the call that it reads, the table of all, and how it makes a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import libcst as cst

from porter.analyze import scalars
from porter.analyze.poly import Poly
from porter.analyze.run import Run
from porter.analyze.values import ONE, SYMBOLIC, Repeated, Scalar, Sequence, Shape, Tensor, Value, const


@dataclass
class Call:
    """One operation: positional values (receiver first), keywords, and the node for refusals."""

    run: Run | None
    name: str
    args: list[Value]
    kwargs: dict[str, Value]
    node: cst.CSTNode | None

    def get(self, position: int, name: str, default: Value | None = None) -> Value | None:
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[position] if position < len(self.args) else default

    def number(self, position: int, name: str, default: int | None = None) -> int | None:
        value = self.get(position, name)
        return default if value is None else scalars.number(value)

    @property
    def shape(self) -> Shape | None:
        return shape_of(self.args[0]) if self.args else None


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def shape_of(value: Value) -> Shape | None:
    if isinstance(value, Tensor):
        return value.shape
    return () if isinstance(value, Scalar) else None


def build(op: str, args: tuple[Value, ...], shape: Shape | None, node: cst.CSTNode | None, **attrs: Any) -> Tensor:
    """A tensor made by `op`; it is sizes-only when every tensor that it came from is."""
    tensors = [a for a in _nested(args) if isinstance(a, Tensor)]
    attrs.setdefault("sizes_only", all(t.sizes_only for t in tensors))
    return Tensor(op=op, args=args, shape=shape, node=node, attrs=attrs)


def _nested(args: tuple[Value, ...]) -> list[Value]:
    flat: list[Value] = []
    for value in args:
        if isinstance(value, Sequence | Repeated):
            flat += _nested(value.items if isinstance(value, Sequence) else (value.item,))
        else:
            flat.append(value)
    return flat


def shape_value(base: Tensor) -> Value:
    if base.shape is None:
        return Value(op="unknown", args=(base,), attrs={"why": "the shape of a tensor whose layout is unknown"})
    items = tuple(
        Scalar(
            op="size",
            args=(base, const(i)),
            text=size.text(),
            size=size,
            const=int(size.number) if size.number is not None else SYMBOLIC,
        )
        for i, size in enumerate(base.shape)
    )
    return Sequence(op="shape", args=(base,), items=items, prefix=len(items))


def broadcast(left: Shape | None, right: Shape | None) -> Shape | None:
    if left is None or right is None:
        return None
    rank = max(len(left), len(right))
    a = (ONE,) * (rank - len(left)) + tuple(left)
    b = (ONE,) * (rank - len(right)) + tuple(right)
    return tuple(y if x == ONE else x for x, y in zip(a, b, strict=True))


def axis(number: int | None, rank: int) -> int | None:
    return None if number is None else number % rank if rank else 0


def size_list(values: list[Value]) -> list[Value]:
    if len(values) == 1 and isinstance(values[0], Sequence):
        return list(values[0].items)
    return values


def element(value: Value) -> Poly | None:
    """The number of a scalar, or of a tensor without dims that counts: `arange(n)[-1] + 1` is n."""
    if isinstance(value, Scalar):
        return value.size if value.op != "item" else element(value.args[0])
    if not isinstance(value, Tensor) or value.shape != () or len(value.args) != 2:
        return None
    if value.op in ("add", "sub"):
        left, right = element(value.args[0]), element(value.args[1])
        return None if left is None or right is None else left + right if value.op == "add" else left - right
    table, place = value.args[0], scalars.number(value.args[1])
    if value.op != "getitem" or table.op != "arange" or place is None:
        return None
    count = len(table.args) - len(table.attrs.get("kw", ()))
    ends = [element(a) for a in table.args[:count]]
    start, stop = ([Poly.const(0), *ends] if count == 1 else ends)[:2]
    if start is None or stop is None or count > 2:
        return None
    return (start if place >= 0 else stop) + Poly.const(place)


def size_shape(values: list[Value]) -> Shape | None:
    sizes = [element(v) for v in size_list(values)]
    return None if any(s is None for s in sizes) else tuple(s for s in sizes if s is not None)
