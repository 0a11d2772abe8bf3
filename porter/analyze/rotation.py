"""Read RoPE from queries and keys, checked on numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from porter.analyze.core import PROJECTED, Core, Rotation, layout_chain
from porter.analyze.counting import LONG
from porter.analyze.evaluate import Evaluator
from porter.analyze.flows import tensors_behind
from porter.analyze.point import Point, Unevaluable, guess
from porter.analyze.values import Scalar, Tensor, Value


def read_rotation(core: Core, point: Point) -> Rotation | None:
    """RoPE on queries and keys, if there is a standard one; another rotation stays in the port.

    A file may read how much of a head is rotated and then run for the whole head only.
    """
    if not turns(layout_chain(core.query)[-1]) or not turns(layout_chain(core.key)[-1]):
        return None
    whole = Point(point.heads, point.theta, {**point.fields, "partial_rotary_factor": 1.0}, point.seq)
    return _standard(core, point) or _standard(core, whole)


def _standard(core: Core, point: Point) -> Rotation | None:
    for query in layout_chain(core.query):
        for key in layout_chain(core.key):
            found = _rotation_of(query, key, point)
            if found is not None:
                return found
    return None


def _rotation_of(query: Tensor, key: Tensor, point: Point) -> Rotation | None:
    """The rotation that leads to these two values, if it is a standard one and the same for both."""
    before_query, before_key = _before_rotation(query, point), _before_rotation(key, point)
    if before_query is None or before_key is None:
        return None
    for base in (10000.0, *_fixed_bases(query)):
        first = _classify(query, before_query, point, base=base)
        if first is None or first != _classify(key, before_key, point, base=base):
            continue
        interleaved, rotary, full = first
        if not all(_is_same_far_on(v, b, point, first, base) for v, b in ((query, before_query), (key, before_key))):
            return None
        from_config = _classify(query, before_query, point, theta=500.0, base=base) is None
        fields, sizes = _rope_fields(query, before_query)
        return Rotation(before_query, before_key, interleaved, rotary, full, from_config, base, fields, sizes)
    return None


def _fixed_bases(value: Tensor) -> list[float]:
    """Numbers that the file itself takes to a power, which may be the base."""
    powers = [v.args[0] for v in value.walk(PROJECTED) if v.op == "pow" and v.args]
    numbers = {float(v.const) for v in powers if isinstance(v, Scalar) and isinstance(v.const, int | float)}
    return sorted(numbers - {10000.0})


def _is_same_far_on(value: Tensor, before: Tensor, point: Point, first: tuple[bool, int, bool], base: float) -> bool:
    """Whether later positions turn alike: some files scale those beyond the length of their training."""
    far = Point(point.heads, fields=point.fields, seq=LONG)
    return (
        _turned(value, before, far) is None or _classify(value, before, far, base=base) == first
    )  # None: past a table's end


def turns(value: Value) -> bool:
    """Whether a value holds sines of something since it was projected; the size of what does says nothing."""
    return any(v.op in ("cos", "sin", "polar") for v in tensors_behind(value, PROJECTED))


def depends_on_positions(value: Value) -> bool:
    return any(
        v.op in ("cos", "sin", "polar") and isinstance(v, Tensor) and v.sizes_only for v in value.walk(PROJECTED)
    )


def _before_rotation(value: Tensor, point: Point) -> Tensor | None:
    """The nearest value from which sizes and positions alone lead to `value`."""
    for candidate in value.walk(PROJECTED):
        if not isinstance(candidate, Tensor) or candidate.sizes_only or candidate.shape is None:
            continue
        if depends_on_positions(candidate) or candidate.op == "view_as_complex":
            continue
        try:
            e = Evaluator(point)
            e.memo[id(candidate)] = np.zeros(e.shape(candidate))
            e(value)
        except Unevaluable:
            continue
        return candidate
    return None


def _classify(
    value: Tensor, before: Tensor, point: Point, theta: float = 10000.0, base: float = 10000.0
) -> tuple[bool, int, bool] | None:
    """(interleaved, rotated dims, all of them?) if `value` is the standard rotation of `before`, by numbers."""
    found = _turned(value, before, Point(point.heads, theta, point.fields, point.seq))
    if found is None:
        return None
    laid, turned = found
    dim, position = turned.shape[-1], _token_axis(turned.shape, point.seq)
    if laid is None or laid.shape != turned.shape or position is None:
        return None
    for rotary in range(dim, 0, -2):
        for interleaved in (False, True):
            if np.allclose(rotate(laid, rotary, interleaved, position, base), turned, atol=1e-4):
                return interleaved, rotary, rotary == dim
    return None


def _turned(value: Tensor, before: Tensor, point: Point) -> tuple[Any, Any] | None:
    """Random numbers for `before` in the layout of `value`, and what comes of them; None if that can't be evaluated."""
    e = Evaluator(point)
    start = np.random.default_rng(0).standard_normal(e.shape(before))
    e.memo[id(before)] = start
    laid = _relay(value, before, start, point)
    try:
        return laid, np.asarray(e(value))
    except Unevaluable:
        return None


def _token_axis(shape: tuple[int, ...], length: int) -> int | None:
    found = [i for i, s in enumerate(shape[:-1]) if s == length and i > 0]
    return found[0] if found else None


def _relay(value: Tensor, before: Tensor, start: Any, point: Point) -> Any:
    """`before` in the layout of `value`: only its own axes moved."""
    e = Evaluator(point)
    shape = e.shape(value)
    if start.shape == shape:
        return start
    moved = np.moveaxis(start, 1, 2) if start.ndim == 4 else start
    if moved.shape == shape:
        return moved
    if start.ndim == 3 and len(shape) == 4 and start.shape[1] == shape[2]:
        return start.reshape(shape[0], shape[2], shape[1], shape[3]).swapaxes(1, 2)
    if start.size == int(np.prod(shape)):
        return start.reshape(shape)
    return None


def rotate(x: Any, rotary: int, interleaved: bool, axis: int, base: float) -> Any:
    """The standard rotation of the first `rotary` of the last axis, positions along `axis`."""
    frequencies = base ** (-np.arange(0, rotary, 2) / rotary)
    length = x.shape[axis]
    angles = np.arange(length)[:, None] * frequencies
    angles = angles.reshape([1] * axis + [length] + [1] * (x.ndim - axis - 2) + [rotary // 2])
    cos, sin = np.cos(angles), np.sin(angles)
    head, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
        out = np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(head.shape)
    else:
        a, b = head[..., : rotary // 2], head[..., rotary // 2 :]
        out = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return np.concatenate([out, rest], axis=-1)


def is_theta(text: str) -> bool:
    """Whether the source of a scalar is, by its words, a base of RoPE."""
    return guess(text) == 10000.0


def _rope_fields(value: Tensor, before: Tensor) -> tuple[frozenset[str], tuple[Scalar, ...]]:
    """The config texts that the rotation reads, and the sizes in it."""
    seen: set[int] = {id(v) for v in before.walk(PROJECTED)}
    scalars = [v for v in value.walk(PROJECTED) if isinstance(v, Scalar) and id(v) not in seen and not v.known]
    return frozenset(s.text for s in scalars if s.op in ("leaf", "config_item", "getattr")), tuple(scalars)
