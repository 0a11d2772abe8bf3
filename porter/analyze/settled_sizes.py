"""Sizes on a path: what `a or b` and `a if c else b` of config fields come to, and which sizes can't meet."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping

from porter.analyze.poly import Poly
from porter.analyze.scalars import implied
from porter.analyze.values import ONE, Shape


def settle(size: Poly, taken: Mapping[str, bool]) -> Poly:
    """A size with each choice between config fields replaced by what the path's conditions leave of it."""
    total = Poly.const(0)
    for monomial, coefficient in size.terms:
        term = Poly.const(coefficient)
        for symbol, power in monomial:
            factor = _settled(symbol, dict(taken))
            for _ in range(abs(power)):
                term = term * factor if power > 0 else term.divide(factor) or Poly.symbol(size.text())
        total = total + term
    return total


def _settled(symbol: str, taken: dict[str, bool]) -> Poly:
    if " or " not in symbol and " if " not in symbol:
        return Poly.symbol(symbol)
    try:
        node = ast.parse(symbol, mode="eval").body
    except SyntaxError:
        return Poly.symbol(symbol)
    left = _left(node, taken)
    return Poly.symbol(symbol) if left is None else _size(left)


def _left(node: ast.expr, taken: dict[str, bool]) -> ast.expr | None:
    """What is left of a choice that the path settles."""
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or) and len(node.values) == 2:
        first, second = node.values
        return second if implied(f"{ast.unparse(first)} is None", taken) else None
    if isinstance(node, ast.IfExp):
        asked = implied(ast.unparse(node.test), taken)
        return None if asked is None else node.body if asked else node.orelse
    return None


def _size(node: ast.expr) -> Poly:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Poly.const(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        found = _OPERATIONS[type(node.op)](_size(node.left), _size(node.right))
        return Poly.symbol(ast.unparse(node)) if found is None else found
    return Poly.symbol(ast.unparse(node))


_OPERATIONS: dict[type[ast.operator], Callable[[Poly, Poly], Poly | None]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a.divide(b),
}


def clash(left: Shape | None, right: Shape | None, taken: Mapping[str, bool]) -> bool:
    """Whether two shapes never broadcast on a path: a size meets the same size times fields of the config.

    With such fields 1 they would; a port is for configs that split heads.
    """
    pairs = zip(reversed(left or ()), reversed(right or ()), strict=False)
    return any(
        x != y and ONE not in (x, y) and (_is_multiple(x, y, taken) or _is_multiple(y, x, taken)) for x, y in pairs
    )


def _is_multiple(size: Poly, other: Poly, taken: Mapping[str, bool]) -> bool:
    size, other = settle(size, taken), settle(other, taken)
    quotient = size.divide(other) if other.number is None else None
    if quotient is None or len(quotient.terms) != 1:
        return False
    ((powers, coefficient),) = quotient.terms
    return coefficient >= 1 and bool(powers) and all(p > 0 and _is_field(s) for s, p in powers)


def _is_field(symbol: str) -> bool:
    return symbol.startswith("config.") and symbol.removeprefix("config.").isidentifier()
