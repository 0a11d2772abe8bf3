"""Read what is added to an attention's scores: masks and ALiBi."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from porter.analyze.core import Core, NotUnderstood, tensor_of
from porter.analyze.evaluate import Evaluator
from porter.analyze.point import SEQ_LENGTH, Point, Unevaluable
from porter.analyze.values import Mask, Scalar, Tensor, Value


def read_addend(core: Core, addend: Tensor, factors: list[tuple[str, Value]], point: Point) -> bool:
    """What is added to the scores: a mask (returns True) or ALiBi."""
    if isinstance(addend, Mask):
        return _read_mask(core, addend)
    if addend.op == "add_mask":
        read_addend(core, tensor_of(addend.args[0], "bias"), factors, point)
        return _read_mask(core, addend.args[1])
    try:
        array = np.asarray(Evaluator(point)(addend), dtype=float)
    except Unevaluable as error:
        raise NotUnderstood(f"what is added to the scores can't be evaluated ({error})") from error
    masked = array <= -1e4
    causal = False
    if masked.any():
        causal = _read_mask_array(core, addend, masked, point)
        array = np.where(masked, 0.0, array)
    if np.abs(array).max() > 0:
        _read_alibi(core, addend, array, factors, point)
    return causal


def _read_mask(core: Core, mask: Value) -> bool:
    if not isinstance(mask, Mask):
        raise NotUnderstood("a mask that is no tensor")
    if mask.kind == "by_key":
        kinds = {m.kind for m in mask.args[1:] if isinstance(m, Mask)}
        if kinds & {"causal", "sliding"}:
            kinds -= {"padding"}  # of layers with states, beside those with attention
        if not kinds <= {"causal", "sliding"}:
            raise NotUnderstood(f"the mask is {', '.join(sorted(kinds - {'causal', 'sliding'}))}, not causal")
        core.by_key = mask
    elif mask.kind == "sliding":
        core.window = core.window or mask.window
    elif mask.kind != "causal":
        raise NotUnderstood(f"the mask is {mask.kind}, not causal")
    return True


def _read_mask_array(core: Core, addend: Tensor, masked: Any, point: Point) -> bool:
    width = _mask_width(masked)
    if width is None:
        raise NotUnderstood("the mask is not plainly causal")
    if width < SEQ_LENGTH:
        core.window, core.masks_window = _window_field(addend, width, point), True
    return True


def _mask_width(masked: Any) -> int | None:
    """How many tokens, its own included, each token of a causal mask sees at most; None if it is no such mask."""
    square = masked.reshape(-1, *masked.shape[-2:])[:, -SEQ_LENGTH:, :SEQ_LENGTH]
    if square.shape[-2:] != (SEQ_LENGTH, SEQ_LENGTH):
        return None
    width = int((~square[0, -1]).sum())
    rows, columns = np.arange(SEQ_LENGTH)[:, None], np.arange(SEQ_LENGTH)[None, :]
    hidden = (columns > rows) | (columns <= rows - width)
    return width if width > 0 and all((s == hidden).all() for s in square) else None


def _window_field(addend: Tensor, width: int, point: Point) -> Scalar:
    """The config field that is the window of a mask: its number is the window's, also when it changes."""
    for value in addend.walk():
        if not isinstance(value, Scalar) or value.known or value.op not in ("leaf", "getattr", "config_item"):
            continue
        names = [n for n in re.findall(r"\w+", value.text) if n not in ("config", "self", "getattr", "None")]
        if names and all(_width_with(addend, names[0], w, point) == w for w in (width, width + 1)):
            return value
    raise NotUnderstood("the mask has a window that is no field of the config")


def _width_with(addend: Tensor, field: str, number: int, point: Point) -> int | None:
    moved = Point(point.heads, point.theta, {**point.fields, field.lower(): float(number)}, point.seq)
    try:
        return _mask_width(np.asarray(Evaluator(moved)(addend), dtype=float) <= -1e4)
    except (Unevaluable, TypeError, ValueError):
        return None


def check_zeroed(core: Core, factor: Tensor, point: Point) -> None:
    """Scores that are multiplied by 0 where the mask hides them, and by 1 elsewhere, are only masked."""
    e = Evaluator(point)
    try:
        array = np.asarray(e(factor), dtype=float)
        masked = sum(np.asarray(e(addend), dtype=float) for addend, _ in core.addends) <= -1e4
        array, masked = np.broadcast_arrays(array, masked)
    except (Unevaluable, ValueError) as error:
        raise NotUnderstood(f"what the scores are multiplied by can't be evaluated ({error})") from error
    if not ((array == 1) | ((array == 0) & masked)).all():
        raise NotUnderstood("the scores are multiplied by something that is neither a number nor a mask")


def standard_slopes(heads: int) -> list[float]:
    """ALiBi slopes (Press et al. 2022): a geometric series, interpolated for head counts that are no power of two."""
    power = 2 ** int(np.floor(np.log2(heads)))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]


def _read_alibi(core: Core, addend: Tensor, array: Any, factors: list[tuple[str, Value]], point: Point) -> None:
    heads = point.heads
    try:
        biases = np.broadcast_to(
            array.reshape(-1, heads, *array.shape[-2:])[:, :, -1, :SEQ_LENGTH],
            (array.size // (heads * array.shape[-2] * array.shape[-1]), heads, SEQ_LENGTH),
        )
    except ValueError as error:
        raise NotUnderstood("a bias on the scores that is not ALiBi") from error
    expected = np.asarray(standard_slopes(heads))[:, None] * np.arange(SEQ_LENGTH)
    shifted = biases - biases[..., :1]
    if not np.allclose(shifted, expected, rtol=1e-4, atol=1e-6):
        raise NotUnderstood("a bias on the scores that is not ALiBi with the standard slopes")
    if core.alibi is not None:
        raise NotUnderstood("two position biases on one attention")
    core.alibi, core.alibi_scale = addend, factors
    core.alibi_dtype = "bfloat16" if any(v.op == "bfloat16" for v in addend.walk()) else ""
