"""Every pass does what its examples show, does it once, and leaves alone what it says it leaves alone."""

from collections.abc import Sequence
from pathlib import Path

import libcst as cst
import pytest

from porter.analyze.interp import explore
from porter.analyze.program import Program
from porter.passes.base import Example, Pass, Stage, Unchanged, discover

PASSES = discover()
EXAMPLES = [pytest.param(p, e, id=f"{p.name}-{i}") for p in PASSES for i, e in enumerate(p.EXAMPLES)]
UNCHANGED = [pytest.param(p, u, id=f"{p.name}-{i}") for p in PASSES for i, u in enumerate(p.UNCHANGED)]
STRIP = [p for p in PASSES if p.stage is Stage.STRIP]
# Orders of the STRIP passes: each is a turn through all, repeated to the fixed point.
ORDERS = {"reversed": STRIP[::-1], "odd first": STRIP[1::2] + STRIP[::2], "from the middle": STRIP[3:] + STRIP[:3]}
TURNS = 40


def apply(each: Pass, source: str, flat: bool = False) -> str:
    """A pass on a file, as its stage would find it; `flat` if tokens are flat already."""
    return each.apply(explore(Program.read(cst.parse_module(source)), flat=flat or each.flat)).code


def settle(passes: Sequence[Pass], source: str) -> str:
    """The fixed point of passes taken in turn."""
    for _ in range(TURNS):
        before = source
        for each in passes:
            source = apply(each, source)
        if source == before:
            return source
    raise AssertionError("no fixed point")


@pytest.mark.parametrize(("each", "example"), EXAMPLES)
def test_an_example_is_what_the_pass_does(each: Pass, example: Example) -> None:
    assert apply(each, example.before) == example.after


@pytest.mark.parametrize(("each", "example"), EXAMPLES)
def test_the_result_of_an_example_is_left_alone(each: Pass, example: Example) -> None:
    assert apply(each, example.after, flat=each.stage is Stage.FLATTEN) == example.after


@pytest.mark.parametrize(("each", "unchanged"), UNCHANGED)
def test_what_a_pass_must_not_touch_stays(each: Pass, unchanged: Unchanged) -> None:
    assert apply(each, unchanged.source) == unchanged.source


@pytest.mark.parametrize("each", PASSES, ids=lambda p: p.name)
def test_a_pass_explains_itself(each: Pass) -> None:
    assert each.EXAMPLES
    assert type(each).__doc__
    assert each.reason
    assert "\n" not in each.reason
    assert all(u.reason for u in each.UNCHANGED)


def test_pass_names_are_unique() -> None:
    names = [p.name for p in PASSES]
    assert len(set(names)) == len(names)


def _tiny_models() -> list[str]:
    """Two models without attention in which most STRIP passes have work: one in old idiom, one in today's."""
    return [(Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8") for name in ("rush", "sedge")]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("source", _tiny_models(), ids=["rush", "sedge"])
def test_the_order_of_the_strip_passes_does_not_matter(source: str, order: str) -> None:
    assert settle(ORDERS[order], source) == settle(STRIP, source)


def test_the_tiny_models_give_most_strip_passes_work() -> None:
    worked = {p.name for s in _tiny_models() for p in STRIP if apply(p, s) != s}
    assert len(worked) > len(STRIP) // 2


def test_stages_come_in_the_order_of_conversion() -> None:
    assert [p.stage for p in PASSES] == sorted(p.stage for p in PASSES)
    assert {p.stage for p in PASSES} == set(Stage)
