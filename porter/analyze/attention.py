"""Recognise attention by data flow: softmax over query-key products, whatever the spelling, into one traits record.

Every reading is checked on numbers: masks, ALiBi slopes, rotations and head layouts are evaluated on small sizes and
compared with what the runtime's layer will compute.
"""

from __future__ import annotations

from porter.analyze.bias import check_zeroed, read_addend
from porter.analyze.core import Core, Inconsistent, NotUnderstood
from porter.analyze.facts import World
from porter.analyze.heads import read_heads, read_sources
from porter.analyze.point import Point, Unevaluable, guess
from porter.analyze.rotation import read_rotation
from porter.analyze.scores import from_interface, from_product, softmax_of
from porter.analyze.settled_sizes import settle
from porter.analyze.values import Tensor


def find_cores(world: World) -> list[Core]:
    """Every attention that ran on this path, in order of execution.

    Raises:
        NotUnderstood: with the reason, when an attention is there but can't be read.
    """
    cores: list[Core] = []
    seen: set[int] = set()
    for values in list(world.values.values()):
        for value in values:
            if not isinstance(value, Tensor) or id(value) in seen:
                continue
            seen.add(id(value))
            if value.op == "attention":
                cores.append(from_interface(value))
            elif value.op in ("permute",) and value.args and value.args[0].op == "attention":
                inner = value.args[0]
                if isinstance(inner, Tensor) and id(inner) not in seen:
                    seen.add(id(inner))
                    cores.append(from_interface(inner))
            elif value.op in ("matmul", "bmm", "einsum") and softmax_of(value) is not None:
                cores.append(from_product(value))
    point = point_for(world)
    for core in cores:
        _complete_somewhere(core, point)
        _settle_sizes(core, dict(world.decisions))
    return cores


def _settle_sizes(core: Core, taken: dict[str, bool]) -> None:
    for name in ("heads", "kv_heads", "head_dim", "v_head_dim"):
        size = getattr(core, name)
        setattr(core, name, settle(size, taken) if size is not None else None)


def _complete_somewhere(core: Core, point: Point) -> None:
    """Read a core at a point with grouped heads; if the path itself forbids those, with as many as query heads."""
    before = dict(core.__dict__)
    try:
        complete(core, point)
    except Unevaluable as error:
        raise NotUnderstood(f"it goes through {error}, which porter can't follow") from error
    except Inconsistent:
        core.__dict__.update(before)
        fields = {name: float(point.heads) for name in ("num_kv_heads", "num_key_value_heads", "n_head_kv")}
        complete(core, Point(point.heads, fields={**point.fields, **fields}))


def point_for(world: World) -> Point:
    """A point at which the conditions of the path hold as they were taken, as far as numbers decide them."""
    best: tuple[int, Point] | None = None
    asked = {k.removeprefix("config."): v for k, v in world.decisions if k.removeprefix("config.").isidentifier()}
    flags = {name: float(on) for name, on in asked.items() if not on or guess(name) is None}
    for heads in (4, 6):
        point = Point(heads, fields=flags)
        wrong = 0
        for key, taken in world.decisions:
            if "math" in key:
                try:
                    wrong += bool(point.text(key)) is not taken
                except (Unevaluable, KeyError, TypeError):
                    continue
        if best is None or wrong < best[0]:
            best = (wrong, point)
    assert best is not None
    return best[1]


def complete(core: Core, point: Point) -> None:
    """Read masks, ALiBi, RoPE and head layouts from the values, each checked on numbers."""
    causal = core.causal
    for addend, factors in core.addends:
        causal |= read_addend(core, addend, factors, point)
    for factor in core.zeroed:
        check_zeroed(core, factor, point)
    if not causal:
        raise NotUnderstood("the attention has no causal mask")
    read_heads(core)
    core.rotation = read_rotation(core, point)
    read_sources(core, point)
