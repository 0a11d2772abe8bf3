"""Evaluate a symbolic value on small made-up sizes with numpy: masks, ALiBi, rotations, head layouts.

Nothing of the file runs: only the recorded operations, each by its own rule in evaluate_ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from porter.analyze.evaluate_ops import OPS
from porter.analyze.point import Point, Unevaluable
from porter.analyze.values import Mask, Scalar, Sequence, Tensor, Value, is_none

NEGATIVE = -1e30


Array = Any


class Evaluator:
    """Evaluates values at a point; `leaves` replaces chosen values by given arrays."""

    def __init__(self, point: Point, leaves: Mapping[int, Array] | None = None) -> None:
        self.point = point
        self.memo: dict[int, Any] = dict(leaves or {})

    def __call__(self, value: Value) -> Any:
        if id(value) not in self.memo:
            try:
                with np.errstate(all="ignore"):
                    self.memo[id(value)] = self._compute(value)
            except (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError, OverflowError) as error:
                raise Unevaluable(f"{value.op}: {error}") from error
        return self.memo[id(value)]

    def _compute(self, value: Value) -> Any:
        if isinstance(value, Scalar):
            return self._scalar(value)
        if isinstance(value, Mask):
            return mask_array(value, self.point)
        if isinstance(value, Sequence):
            if value.op == "slice":
                return slice(*[None if is_none(v) else int(self(v)) for v in value.items])
            return tuple(self(v) for v in value.items)
        if isinstance(value, Tensor):
            function = OPS.get(value.op)
            if function is None:
                raise Unevaluable(value.op)
            return function(self, value)
        raise Unevaluable(value.op)

    def _scalar(self, value: Scalar) -> Any:
        if value.known:
            return value.const
        if value.op == "finfo" or "finfo" in value.text:
            return NEGATIVE
        if value.op in ("dtype", "device", "string"):
            return None
        if value.size is not None:
            return self.point.size(value.size)
        return self.point.text(value.text)

    def positional(self, value: Value) -> list[Any]:
        count = len(value.args) - len(value.attrs.get("kw", ()))
        return [self(a) for a in value.args[:count]]

    def keywords(self, value: Value) -> dict[str, Any]:
        names = value.attrs.get("kw", ())
        return {
            n: self(a)
            for n, a in zip(names, value.args[len(value.args) - len(names) :], strict=True)
            if n not in ("device", "dtype", "out")
        }

    def shape(self, value: Tensor) -> tuple[int, ...]:
        if value.shape is None:
            raise Unevaluable(value.op)
        return tuple(int(self.point.size(s)) for s in value.shape)


def mask_array(mask: Mask, point: Point) -> Array:
    rows, columns = np.arange(point.seq)[:, None], np.arange(point.seq)[None, :]
    allowed = columns <= rows
    if mask.kind == "sliding":
        allowed &= columns > rows - int(point.field("window"))
    elif mask.kind != "causal":
        raise Unevaluable(mask.kind)
    return np.where(allowed, 0.0, NEGATIVE)[None, None]
