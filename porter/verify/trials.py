"""Attention that is wrong is tried again with one setting changed: the change that makes it right is the cause."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

_RIGHT = 0.1  # of the error may remain once the cause is removed

Trial = tuple[str, dict[str, Any]]  # what was wrong, and the attention layer's attributes that put it right


def tried(attention: Any, original: nn.Module, error: float, rerun: Callable[[], float | None]) -> str:
    """What was wrong, by the first change of `attention`'s settings with which `rerun` gives far less than `error`."""
    for told, changes in _trials(attention, original):
        before = {name: getattr(attention, name) for name in changes}
        _set(attention, changes)
        try:
            after = rerun()
        finally:
            _set(attention, before)
        if after is not None and after < _RIGHT * error:
            return f"{told}; with that changed its error is {after:.1e}"
    return ""


def _set(attention: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        setattr(attention, name, value)


def _trials(attention: Any, original: nn.Module) -> Iterator[Trial]:
    traits = attention.traits
    scaling = getattr(original, "scaling", None)
    if isinstance(scaling, float) and scaling != traits.scaling:
        yield (
            f"the score's scale is {traits.scaling:.4g}, the original's {scaling:.4g}",
            _traits(attention, scaling=scaling),
        )
    yield from _windows(attention, original)
    yield from _rotations(attention, original)
    cap = next((value for name, value in vars(original).items() if "softcap" in name), traits.softcap)
    if cap != traits.softcap:
        yield f"the softcap is {traits.softcap}, the original's {cap}", _traits(attention, softcap=cap)
    sinks = getattr(original, "sinks", None)
    if isinstance(sinks, torch.Tensor) and not attention._sinks:
        yield "the sinks are lost", {"_sinks": [sinks.detach()]}
    if attention.alibi_slopes is not None:
        yield "the ALiBi slopes are in reverse order", {"alibi_slopes": attention.alibi_slopes.flip(0)}
        for factor in (2.0, 0.5):
            yield f"the ALiBi slopes need a factor of {factor}", {"alibi_slopes": attention.alibi_slopes * factor}
    yield "the sign of the scores is turned", _traits(attention, scaling=-traits.scaling)
    for factor in (traits.scaling, 1 / traits.scaling):
        yield (
            f"the score's scale is applied once too often or not at all (x {factor:.4g})",
            _traits(attention, scaling=traits.scaling * factor),
        )


def _windows(attention: Any, original: nn.Module) -> Iterator[Trial]:
    mine = attention.traits.sliding_window
    config = getattr(original, "config", None)
    theirs = [getattr(each, "sliding_window", None) for each in (original, config)]
    for window in dict.fromkeys([*theirs, None, *((mine + 1, mine - 1) if mine else ())]):
        if window != mine and (window is None or isinstance(window, int)):
            yield f"the sliding window is {mine}, the original's {window}", _traits(attention, sliding_window=window)


def _rotations(attention: Any, original: nn.Module) -> Iterator[Trial]:
    if not hasattr(attention, "rotary_emb"):
        return
    paired = "even and odd dimensions" if attention.interleaved else "halves"
    yield f"the rotary pairs are taken wrongly ({paired})", {"interleaved": not attention.interleaved}


def _traits(attention: Any, **changes: Any) -> dict[str, Any]:
    return {"traits": replace(attention.traits, **changes)}


def rotation_differs(attention: Any, reference: nn.Module) -> str:
    """Whether the inverse frequencies of the port are none of the original's."""
    theirs = [buffer for name, buffer in reference.named_buffers() if name.endswith("inv_freq")]
    if not hasattr(attention, "rotary_emb") or not theirs:
        return ""
    mine = attention.rotary_emb.inv_freq.float().cpu()
    if any(mine.shape == other.shape and torch.allclose(mine, other.float(), rtol=1e-5) for other in theirs):
        return ""
    other = theirs[0].float()
    if mine.shape != other.shape:
        return f"{2 * len(mine)} dimensions are rotated (rotary), {2 * len(other)} in the original"
    place = int((mine / other - 1).abs().argmax())
    return (
        f"the rotary frequencies differ: number {place} is {float(mine[place]):.4g}, the original's "
        f"{float(other[place]):.4g} (base or scaling)"
    )
