"""Position ids by their numbers: whether values count along the sequence, and from where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from porter.analyze.evaluate import Evaluator
from porter.analyze.facts import World
from porter.analyze.point import Point, Unevaluable
from porter.analyze.values import Tensor, Value

LONG = 41  # a length at which positions that are cut off or wrap around show


def counts(values: Sequence[Value]) -> bool:
    """Whether values are 0, 1, 2 ... along the sequence, whatever the batch."""
    return counted(values) == 0


def counted(values: Sequence[Value]) -> int | None:
    """The number from which all values count by one along the sequence, if no field of the config moves it."""
    found: set[int | None] = set()
    for value in values:
        found |= {_start(value, Point(seq=LONG)), _start(value, Point(seq=LONG, fields={"pad_token_id": 7}))}
    return found.pop() if len(found) == 1 else None


def _start(value: Value, point: Point) -> int | None:
    rows = _rows(value, point)
    if rows is None or rows.shape[-1] != point.seq:
        return None
    first = int(rows[0, 0])
    return first if all((row == np.arange(first, first + point.seq)).all() for row in rows) else None


def _rows(value: Value, point: Point) -> Any:
    """What a value made of sizes alone is, one row for each sequence."""
    if not isinstance(value, Tensor) or not value.sizes_only or not value.shape:
        return None
    try:
        array = np.asarray(Evaluator(point)(value))
    except Unevaluable:
        return None
    return array.reshape(-1, array.shape[-1]) if array.ndim else None


def same_everywhere(values: Sequence[Value]) -> int | None:
    """The one number that ids are for every token, whatever the batch: a token type that nobody gives."""
    found: set[float] = set()
    for value in values:
        rows = _rows(value, Point())
        if rows is None:
            return None
        found |= set(np.unique(rows).tolist())
    return int(found.pop()) if len(found) == 1 else None


def place_ids(value: Value) -> tuple[Value, ...]:
    """What an embedding or a table is looked up with."""
    if value.op == "index_select":
        return value.args[2:3]
    return value.args[:1] if value.op == "embedding" else ()


def looked_up(worlds: Sequence[World]) -> set[bytes]:
    """The rows of position tables that a file reads, on any path."""
    found: set[bytes] = set()
    for world in worlds:
        for values in world.values.values():
            for ids in (i for value in values for i in place_ids(value)):
                rows = _rows(ids, Point())
                found |= {row.astype(float).tobytes() for row in rows} if rows is not None else set()
    return found
