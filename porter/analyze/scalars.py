"""Arithmetic and logic on Python scalars that may be open (config fields) or sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from porter.analyze.poly import Poly
from porter.analyze.values import (
    ClassRef,
    Config,
    External,
    Function,
    Instance,
    Layer,
    Mapping,
    Mask,
    Repeated,
    Scalar,
    Sequence,
    Tensor,
    Value,
    const,
    is_none,
)

_PYTHON: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "pow": operator.pow,
    "logical_and": operator.and_,
    "logical_or": operator.or_,
    "logical_xor": operator.xor,
}
_SIGN = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "floor_divide": "//",
    "remainder": "%",
    "pow": "**",
    "logical_and": "&",
    "logical_or": "|",
    "logical_xor": "^",
}
_COMPARE: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "Equal": ("==", operator.eq),
    "NotEqual": ("!=", operator.ne),
    "LessThan": ("<", operator.lt),
    "LessThanEqual": ("<=", operator.le),
    "GreaterThan": (">", operator.gt),
    "GreaterThanEqual": (">=", operator.ge),
    "Is": ("is", operator.is_),
    "IsNot": ("is not", operator.is_not),
    "In": ("in", lambda a, b: a in b),
    "NotIn": ("not in", lambda a, b: a not in b),
}
# Open scalars that may be None: what a config holds, not what is computed from sizes.
_MAYBE_NONE = frozenset({"leaf", "getattr", "config_item", "choose", "and", "or"})
# The plain rotation is analysed; scaled ones come from the config's rope parameters, in the runtime.
ROPE_DELEGATED = {
    "config.rope_scaling is None": True,
    "config.rope_scaling": False,
    "hasattr(config, 'rope_scaling')": False,
}
_NEGATED = {"!=": "==", "is not": "is", "not in": "in"}


def text(value: Value) -> str:
    """Source text over config fields for a value, for keys and emitted expressions."""
    if isinstance(value, Scalar):
        return value.text or repr(value.const)
    if isinstance(value, Config):
        return value.path
    if isinstance(value, Sequence):
        return "(" + ", ".join(text(v) for v in value.items) + ("," if len(value.items) == 1 else "") + ")"
    if isinstance(value, External):
        return value.name.removeprefix("builtins.")
    return f"<{value.op}>"


def known_truth(value: Value) -> bool | None:
    """The truth of a value if no config decides it, else None."""
    if isinstance(value, Scalar):
        return bool(value.const) if value.known else value.attrs.get("truth")
    if isinstance(value, Sequence):
        return bool(value.items)
    if isinstance(value, Mapping):
        return bool(value.items)
    if isinstance(value, Instance | Layer | Function | ClassRef | External | Repeated | Config | Mask):
        return True
    return None


def condition(value: Scalar) -> tuple[str, bool]:
    """The key of an open condition, and the truth of the key for which the value is true."""
    if value.op == "not" and isinstance(value.args[0], Scalar):
        key, wanted = condition(value.args[0])
        return key, not wanted
    if value.op == "compare":
        sign = value.attrs["sign"]
        left, right = (text(a) for a in value.args)
        if sign in _NEGATED:
            return f"{left} {_NEGATED[sign]} {right}", False
    return value.text, True


def implied(key: str, taken: dict[str, bool]) -> bool | None:
    """What conditions taken before say about this one; the kind of RoPE scaling is the runtime's business."""
    if key in taken:
        return taken[key]
    if "rope_type" in key and key.endswith(" == 'default'"):
        return True
    if "<device>" in key or "<dtype>" in key:
        return False
    if key in ROPE_DELEGATED:
        return ROPE_DELEGATED[key]
    if " == " in key:
        subject = key.split(" == ")[0]
        if any(value and other.startswith(f"{subject} == ") for other, value in taken.items()):
            return False
    if key.endswith(" is None") and taken.get(key.removesuffix(" is None")):
        return False
    if taken.get(f"{key} is None"):
        return False
    if key.endswith(" is None") and taken.get(key.removesuffix(" is None")) is False:
        return True  # an option that is off; the port still asks for None
    return None


def settled(value: Value, taken: dict[str, bool]) -> bool | None:
    """The truth of an open condition if conditions taken before decide it."""
    known = known_truth(value)
    if known is not None or not isinstance(value, Scalar):
        return known
    if value.op == "not":
        inner = settled(value.args[0], taken)
        return None if inner is None else not inner
    if value.op in ("and", "or"):
        sides = [settled(a, taken) for a in value.args]
        stop = value.op == "or"
        return stop if stop in sides else None if None in sides else not stop
    key, wanted = condition(value)
    found = implied(key, taken)
    return None if found is None else found is wanted


def choose(test: Value, yes: Value, no: Value) -> Value:
    """The open scalar `yes if test else no`."""
    if isinstance(yes, Scalar) and isinstance(no, Scalar) and yes.known and no.known and yes.const is no.const:
        return yes
    if isinstance(yes, Scalar) and isinstance(no, Scalar) and yes.size is not None and yes.size == no.size:
        return yes
    source = f"({text(yes)} if {text(test)} else {text(no)})"
    return Scalar(op="choose", args=(test, yes, no), text=source, size=Poly.symbol(source))


def combine(word: str, left: Value, right: Value) -> Value:
    """`left and right` or `left or right` with an open left side."""
    known = known_truth(left)
    if known is not None:
        return right if known == (word == "and") else left
    settled = known_truth(right)
    if (
        settled is not None
        and settled == (word == "or")
        and isinstance(right, Scalar)
        and isinstance(right.const, bool)
    ):
        return right
    source = f"({text(left)} {word} {text(right)})"
    return Scalar(op=word, args=(left, right), text=source, size=Poly.symbol(source))


def unary(name: str, value: Value) -> Value | None:
    if isinstance(value, Tensor):
        return None
    if name == "Not":
        known = known_truth(value)
        return const(not known) if known is not None else Scalar(op="not", args=(value,), text=f"not {_inner(value)}")
    if isinstance(value, Scalar) and value.known:
        return const(-value.const if name == "Minus" else ~value.const if name == "BitInvert" else value.const)
    if isinstance(value, Scalar):
        size = -value.size if value.size is not None and name == "Minus" else None
        return Scalar(op="neg", args=(value,), text=f"-{_wrap(value)}", size=size)
    return Value(op="unknown", args=(value,))


def binary(name: str, left: Value, right: Value) -> Value:
    if not isinstance(left, Scalar) or not isinstance(right, Scalar):
        return Value(op=name, args=(left, right))
    if left.known and right.known:
        return _fold(name, left, right)
    size = _size(name, left, right)
    if size is not None and size.number is not None and size.number.denominator == 1:
        return const(int(size.number))
    source = f"{_wrap(left)} {_SIGN[name]} {_wrap(right)}" if name in _SIGN else f"<{name}>"
    return Scalar(op=name, args=(left, right), text=source, size=size if size is not None else Poly.symbol(source))


def _fold(name: str, left: Scalar, right: Scalar) -> Value:
    try:
        return const(_PYTHON[name](left.const, right.const))
    except (TypeError, ZeroDivisionError, KeyError, ValueError):
        return Value(op="unknown", args=(left, right), attrs={"why": f"{text(left)} {name} {text(right)}"})


def _wrap(value: Scalar) -> str:
    source = text(value)
    simple = value.op in ("leaf", "const", "choose", "index", "getattr", "config_item") or " " not in source
    return source if simple else f"({source})"


def _size(name: str, left: Scalar, right: Scalar) -> Poly | None:
    a, b = left.size, right.size
    if a is None or b is None:
        return None
    if name == "add":
        return a + b
    if name == "sub":
        return a - b
    if name == "mul":
        return a * b
    if name in ("div", "floor_divide"):
        return a.divide(b)
    return None


def compare(name: str, left: Value, right: Value) -> Value:
    """A comparison: known when both sides are, or when the sizes decide it; else an open condition."""
    sign, function = _COMPARE[name]
    if is_none(left) or is_none(right):
        other = right if is_none(left) else left
        if not isinstance(other, Scalar) or other.known or other.op not in _MAYBE_NONE:
            same = is_none(left) and is_none(right)
            return const(same if sign in ("is", "==") else not same if sign in ("is not", "!=") else same)
    if isinstance(left, Scalar) and isinstance(right, Scalar) and left.known and right.known:
        return const(bool(function(left.const, right.const)))
    if isinstance(right, Sequence | Mapping) and sign in ("in", "not in"):
        found = _member(left, right)
        if found is not None:
            return const(found == (sign == "in"))
    if isinstance(left, Sequence) and isinstance(right, Sequence) and sign in ("==", "!="):
        return const((sign == "!=") is not _same_items(left, right))
    decided = _by_size(sign, left, right)
    if decided is not None:
        return const(decided)
    source = f"{_inner(left)} {sign} {_inner(right)}"
    return Scalar(op="compare", args=(left, right), attrs={"sign": sign}, text=source, size=Poly.symbol(source))


def _inner(value: Value) -> str:
    return _wrap(value) if isinstance(value, Scalar) else text(value)


def _same_items(left: Sequence, right: Sequence) -> bool:
    return len(left.items) == len(right.items) and all(
        compare("Equal", a, b).attrs.get("sign") is None and known_truth(compare("Equal", a, b)) is not False
        for a, b in zip(left.items, right.items, strict=True)
    )


def _member(item: Value, box: Sequence | Mapping) -> bool | None:
    if not isinstance(item, Scalar) or not item.known:
        return None
    keys = (
        list(box.items)
        if isinstance(box, Mapping)
        else [v.const if isinstance(v, Scalar) and v.known else None for v in box.items]
    )
    if isinstance(box, Sequence) and any(not isinstance(v, Scalar) or not v.known for v in box.items):
        return True if item.const in keys else None
    return item.const in keys


def _by_size(sign: str, left: Value, right: Value) -> bool | None:
    """Sizes that are equal as polynomials are equal; token counts are generic: unlike any constant, below any limit."""
    if not isinstance(left, Scalar) or not isinstance(right, Scalar):
        return None
    a, b = left.size, right.size
    if a is None or b is None or sign in ("in", "not in", "is", "is not"):
        return None
    if a == b:
        return sign in ("==", "<=", ">=")
    if not (a.has_tokens or b.has_tokens):
        return None
    if sign in ("==", "!="):
        return sign == "!="
    difference = (a - b).number
    if difference is not None:
        return bool(
            _COMPARE[{"<": "LessThan", "<=": "LessThanEqual", ">": "GreaterThan", ">=": "GreaterThanEqual"}[sign]][1](
                difference, 0
            )
        )
    if a.number is not None or b.number is not None:
        return (sign in (">", ">=")) == (b.number is not None)
    return (sign in ("<", "<=")) == a.has_tokens


def call(name: str, function: Callable[..., Any] | None, args: list[Value]) -> Scalar:
    """A Python or math function of scalars, folded when all are known."""
    if function is not None and all(isinstance(a, Scalar) and a.known for a in args):
        try:
            return const(function(*[a.const for a in args if isinstance(a, Scalar)]))
        except (TypeError, ValueError):
            pass
    if name == "int" and len(args) == 1 and isinstance(args[0], Scalar) and _integral(args[0].size):
        return args[0]
    source = f"{name}({', '.join(text(a) for a in args)})"
    return Scalar(op=f"call:{name}", args=tuple(args), text=source, size=Poly.symbol(source))


def _integral(size: Poly | None) -> bool:
    """Whether a size is a plain product of fields, so that int() changes nothing (a ratio divides evenly)."""
    return size is not None and all(
        coefficient.denominator == 1
        and not any("." not in s and s.endswith("factor") for s, _ in monomial)
        and not any("factor" in s or "pct" in s or "(" in s for s, _ in monomial)
        for monomial, coefficient in size.terms
    )


MATH: dict[str, Callable[..., Any]] = {
    name: getattr(math, name) for name in ("sqrt", "log", "log2", "floor", "ceil", "exp", "pow", "cos", "sin", "prod")
}
BUILTIN: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "abs": abs,
    "round": round,
    "bool": bool,
}


def extreme(name: str, args: list[Value]) -> Value:
    """max() or min(), decided by sizes where they decide."""
    if len(args) == 1 and isinstance(args[0], Sequence):
        args = list(args[0].items)
    if not args:
        return Value(op="unknown", attrs={"why": f"{name}() of nothing"})
    best = args[0]
    for other in args[1:]:
        known = None if _is_window(best, other) else known_truth(compare("GreaterThanEqual", best, other))
        if known is None:
            return call(name, None, args)
        best = best if known == (name == "max") else other
    return best


def _is_window(left: Value, right: Value) -> bool:
    """Whether one is a number of tokens and the other a config field, either of which may be larger."""
    sizes = [v.size for v in (left, right) if isinstance(v, Scalar) and v.size is not None]
    return len({s.has_tokens for s in sizes}) == 2 and all(s.number is None for s in sizes)


def number(value: Value) -> int | None:
    """A known integer, also from a size that is a number."""
    if isinstance(value, Scalar):
        if value.known and isinstance(value.const, int):
            return int(value.const)
        if value.size is not None and isinstance(value.size.number, Fraction) and value.size.number.denominator == 1:
            return int(value.size.number)
    return None
