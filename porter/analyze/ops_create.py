"""Shapes of tensors made from sizes and numbers."""

from __future__ import annotations

from typing import Any

from porter.analyze import scalars
from porter.analyze.poly import Poly
from porter.analyze.transfer import Call, build, rule, size_shape
from porter.analyze.values import Repeated, Scalar, Sequence, Tensor


@rule("ones", "zeros", "empty", "rand", "randn")
def _filled(call: Call) -> Any:
    sizes = call.args or ([call.kwargs["size"]] if "size" in call.kwargs else [])
    return size_shape(sizes)


@rule("new_zeros", "new_ones", "new_empty")
def _new_filled(call: Call) -> Any:
    return build(call.name.removeprefix("new_"), tuple(call.args[1:]), size_shape(call.args[1:]), call.node)


@rule("full")
def _full(call: Call) -> Any:
    return size_shape([call.args[0]])


@rule("new_full")
def _new_full(call: Call) -> Any:
    return build("full", tuple(call.args[1:]), size_shape([call.args[1]]), call.node)


@rule("ones_like", "zeros_like", "empty_like", "full_like", "rand_like")
def _like(call: Call) -> Any:
    return build(call.name, tuple(call.args), call.shape, call.node, sizes_only=True)


@rule("arange")
def _arange(call: Call) -> Any:
    sizes = [a.size if isinstance(a, Scalar) else None for a in call.args[:3]]
    if any(s is None for s in sizes):
        return (Poly.symbol(f"arange({', '.join(scalars.text(a) for a in call.args)})"),)
    known = [s for s in sizes if s is not None]
    length = known[0] if len(known) == 1 else known[1] - known[0]
    if len(known) == 3:
        length = length.divide(known[2]) or length
    return (length,)


@rule("tensor", "as_tensor", "from_numpy", "array")
def _tensor(call: Call) -> Any:
    value = call.args[0]
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Sequence):
        return (Poly.const(len(value.items)),)
    return (Poly.symbol(f"len({scalars.text(value)})"),) if isinstance(value, Repeated) else ()


@rule("linspace")
def _linspace(call: Call) -> Any:
    return size_shape([call.args[2]])
