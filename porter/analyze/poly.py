"""Sizes as polynomials over config fields, so that `3 * hidden` and `heads * 3 * head_dim` compare by value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

Monomial = tuple[tuple[str, int], ...]

BATCH = "<batch>"
SEQ = "<seq>"
HITS = "<hits>"  # how many elements of a tensor meet a condition
TOKENS = frozenset({BATCH, SEQ})


@dataclass(frozen=True)
class Poly:
    """Sum of coefficient * product of symbols to integer powers; `terms` is sorted, without zeros."""

    terms: tuple[tuple[Monomial, Fraction], ...]

    @staticmethod
    def of(terms: Mapping[Monomial, Fraction]) -> Poly:
        return Poly(tuple(sorted((m, c) for m, c in terms.items() if c)))

    @staticmethod
    def const(value: int | Fraction) -> Poly:
        return Poly.of({(): Fraction(value)})

    @staticmethod
    def symbol(name: str) -> Poly:
        return Poly.of({((name, 1),): Fraction(1)})

    def __add__(self, other: Poly) -> Poly:
        total = dict(self.terms)
        for monomial, coefficient in other.terms:
            total[monomial] = total.get(monomial, Fraction(0)) + coefficient
        return Poly.of(total)

    def __neg__(self) -> Poly:
        return Poly.of({m: -c for m, c in self.terms})

    def __sub__(self, other: Poly) -> Poly:
        return self + -other

    def __mul__(self, other: Poly) -> Poly:
        total: dict[Monomial, Fraction] = {}
        for left, a in self.terms:
            for right, b in other.terms:
                monomial = _multiply(left, right)
                total[monomial] = total.get(monomial, Fraction(0)) + a * b
        return Poly.of(total)

    def divide(self, other: Poly) -> Poly | None:
        """The exact quotient if it is a single term or `other` is, else None."""
        if not other.terms or not self.terms:
            return None if not other.terms else self
        if len(other.terms) == 1:
            (monomial, coefficient) = other.terms[0]
            inverse = tuple((s, -p) for s, p in monomial)
            return self * Poly.of({inverse: 1 / coefficient})
        for monomial, coefficient in self.terms:
            lead, scale = other.terms[-1]
            guess = Poly.of({_multiply(monomial, tuple((s, -p) for s, p in lead)): coefficient / scale})
            if guess * other == self:
                return guess
        return None

    @property
    def number(self) -> Fraction | None:
        """The value of a constant, else None."""
        if not self.terms:
            return Fraction(0)
        if len(self.terms) == 1 and self.terms[0][0] == ():
            return self.terms[0][1]
        return None

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset(s for monomial, _ in self.terms for s, _ in monomial)

    @property
    def has_tokens(self) -> bool:
        return bool(self.symbols & TOKENS)

    def without_tokens(self) -> Poly | None:
        """This size with batch and sequence divided out; None unless every term carries them alike."""
        if len(self.terms) != 1:
            return None
        monomial, coefficient = self.terms[0]
        return Poly.of({tuple((s, p) for s, p in monomial if s not in TOKENS): coefficient})

    def evaluate(self, values: Mapping[str, float]) -> Fraction:
        total = Fraction(0)
        for monomial, coefficient in self.terms:
            for symbol, power in monomial:
                coefficient *= Fraction(values[symbol]) ** power
            total += coefficient
        return total

    def text(self) -> str:
        """Python source for this size; symbols are already source text."""
        return " + ".join(_term_text(m, c) for m, c in reversed(self.terms)) or "0"


def product(sizes: Iterable[Poly]) -> Poly:
    total = Poly.const(1)
    for size in sizes:
        total = total * size
    return total


def _multiply(left: Monomial, right: Monomial) -> Monomial:
    powers = dict(left)
    for symbol, power in right:
        powers[symbol] = powers.get(symbol, 0) + power
    return tuple(sorted((s, p) for s, p in powers.items() if p))


def _term_text(monomial: Monomial, coefficient: Fraction) -> str:
    above = [s for s, p in monomial for _ in range(p)]
    below = [s for s, p in monomial for _ in range(-p)]
    if coefficient.numerator != 1 or not above:
        above.insert(0, str(coefficient.numerator))
    if coefficient.denominator != 1:
        below.insert(0, str(coefficient.denominator))
    text = " * ".join(above)
    for factor in below:
        text = f"{text} // {factor}"
    return text
