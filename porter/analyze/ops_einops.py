"""`einops.rearrange`: axes named in a pattern, split, moved and merged."""

from __future__ import annotations

import re
from typing import Any

from porter.analyze.poly import Poly, product
from porter.analyze.transfer import Call, build, rule
from porter.analyze.values import ONE, Scalar

Groups = list[list[str]]


def _groups(side: str) -> Groups:
    """`b (h d) 1` as [[b], [h, d], []]."""
    parts = re.findall(r"\(([^)]*)\)|(\S+)", side)
    return [(inside if not single else "" if single == "1" else single).split() for inside, single in parts]


def _spelled_out(pattern: str, rank: int) -> str:
    """A pattern with a name for each of the axes for which `...` stands."""
    named = len(_groups(pattern.split("->")[0])) - 1
    return pattern.replace("...", " ".join(f"axis{i}" for i in range(rank - named)))


def _sizes(groups: Groups, shape: tuple[Poly, ...], known: dict[str, Poly]) -> dict[str, Poly] | None:
    """The size of every named axis; one of each group may be left to be worked out."""
    sizes = dict(known)
    for names, whole in zip(groups, shape, strict=True):
        left = [n for n in names if n not in sizes]
        if len(left) > 1:
            return None
        if left:
            rest = whole.divide(product(sizes[n] for n in names if n not in left))
            if rest is None:
                return None
            sizes[left[0]] = rest
    return sizes


@rule("rearrange")
def _rearrange(call: Call) -> Any:
    pattern = call.args[1]
    if not isinstance(pattern, Scalar) or not isinstance(pattern.const, str) or "->" not in pattern.const:
        return None
    if call.shape is None:
        return None
    before, after = (_groups(side) for side in _spelled_out(pattern.const, len(call.shape)).split("->"))
    if len(before) != len(call.shape):
        return None
    known = {k: v.size for k, v in call.kwargs.items() if isinstance(v, Scalar) and v.size is not None}
    sizes = _sizes(before, call.shape, known)
    flat = [n for names in before for n in names]
    moved = [n for names in after for n in names]
    if sizes is None or sorted(flat) != sorted(moved) or len(set(flat)) != len(flat):
        return None
    shape = tuple(product(sizes[n] for n in names) if names else ONE for names in after)
    order, apart = tuple(flat.index(n) for n in moved), tuple(sizes[n] for n in flat)
    return build("rearrange", (call.args[0],), shape, call.node, order=order, apart=apart)
