"""Sizes as polynomials: arithmetic agrees with numbers, equal sizes compare equal, exact quotients are found."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from porter.analyze.poly import BATCH, SEQ, Poly, product

NAMES = ("config.hidden", "config.heads", "config.dim")
numbers = st.integers(-4, 4)
values = st.fixed_dictionaries({name: st.integers(1, 7) for name in NAMES})


@st.composite
def terms(draw: st.DrawFn) -> Poly:
    """One term: a non-zero factor times symbols."""
    factor = draw(st.integers(1, 5))
    return product([Poly.const(factor), *[Poly.symbol(n) for n in draw(st.lists(st.sampled_from(NAMES), max_size=3))]])


@st.composite
def polys(draw: st.DrawFn) -> Poly:
    total = Poly.const(draw(numbers))
    for each in draw(st.lists(terms(), max_size=3)):
        total = total + each * Poly.const(draw(numbers))
    return total


HIDDEN, HEADS, DIM = (Poly.symbol(name) for name in NAMES)


@given(polys(), polys(), values)
def test_sums_and_products_agree_with_numbers(a: Poly, b: Poly, at: dict[str, float]) -> None:
    assert (a + b).evaluate(at) == a.evaluate(at) + b.evaluate(at)
    assert (a - b).evaluate(at) == a.evaluate(at) - b.evaluate(at)
    assert (a * b).evaluate(at) == a.evaluate(at) * b.evaluate(at)


@given(polys(), polys(), polys())
def test_the_order_of_operations_does_not_show(a: Poly, b: Poly, c: Poly) -> None:
    assert a + b == b + a
    assert a * b == b * a
    assert (a + b) * c == a * c + b * c
    assert a - a == Poly.const(0)


@given(polys(), terms())
def test_a_product_divides_by_a_term(a: Poly, b: Poly) -> None:
    assert (a * b).divide(b) == a


@given(terms(), polys())
def test_a_quotient_times_the_divisor_is_the_dividend(a: Poly, b: Poly) -> None:
    quotient = (a * b).divide(b)
    assert quotient is None or quotient * b == a * b


@given(terms(), values)
def test_the_text_of_a_term_is_python_for_it(a: Poly, at: dict[str, int]) -> None:
    text = a.text()
    for name, value in at.items():
        text = text.replace(name, str(value))
    assert eval(text) == a.evaluate(at)


def test_what_does_not_divide_is_none() -> None:
    assert HIDDEN.divide(HEADS + DIM) is None
    assert HIDDEN.divide(Poly.const(0)) is None


def test_a_sum_divides_by_itself() -> None:
    assert (HIDDEN * (HEADS + DIM)).divide(HEADS + DIM) == HIDDEN


@pytest.mark.parametrize(
    ("size", "number"), [(Poly.const(3), 3), (HIDDEN - HIDDEN, 0), (HIDDEN, None), (HEADS * DIM, None)]
)
def test_a_size_is_a_number_only_without_fields(size: Poly, number: int | None) -> None:
    assert size.number == (None if number is None else Fraction(number))


def test_a_ratio_of_fields_is_no_polynomial_but_compares() -> None:
    ratio = HIDDEN.divide(HEADS)
    assert ratio is not None
    assert ratio * HEADS == HIDDEN
    assert ratio.text() == "config.hidden // config.heads"


def test_tokens_are_divided_out_of_a_single_term_only() -> None:
    tokens = Poly.symbol(BATCH) * Poly.symbol(SEQ)
    assert (tokens * HIDDEN).without_tokens() == HIDDEN
    assert (tokens + HIDDEN).without_tokens() is None
    assert tokens.has_tokens
    assert not HIDDEN.has_tokens
