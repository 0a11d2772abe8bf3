"""Evaluate a symbolic value on small made-up sizes with numpy: masks, ALiBi, rotations, head layouts.

Nothing of the file runs: only the recorded operations, each by its own rule here.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from porter.analyze.poly import BATCH, SEQ, Poly
from porter.analyze.values import Mask, Scalar, Sequence, Tensor, Value, is_none

BATCH_SIZE = 2
SEQ_LENGTH = 6
NEGATIVE = -1e30
Array = Any


class Unevaluable(Exception):
    """A value that needs weights, data or an operation without a rule here."""


# Plausible sizes by the words in a config field's name; only their ratios matter.
_GUESSES: tuple[tuple[tuple[str, ...], float], ...] = (
    (("layer_idx", "layer_id"), 1),
    (("pad_token", "token_id"), 1),
    (("theta", "rope_base", "emb_base"), 10000.0),
    (("partial", "rotary_pct", "rotary_factor"), 0.5),
    (("rotary_dim", "rotary_ndims"), 4),
    (("eps",), 1e-5),
    (("head_dim", "head_size", "kv_channels", "attention_head_dim"), 8),
    (("kv_head", "key_value_head", "head_kv", "kv_n_head", "query_group"), 2),
    (("per_tok", "top_k", "topk"), 2),
    (("expert",), 4),
    (("window",), 3),
    (("max_position", "n_positions", "n_ctx", "max_seq", "seq_length", "max_sequence"), 16),
    (("intermediate", "ffn", "inner", "n_inner"), 64),
    (("vocab",), 96),
    (("n_layer", "num_layers", "hidden_layers"), 2),
    (("soft_cap", "softcap"), 30.0),
)


class Point:
    """One assignment of numbers to config fields; `heads` sets the head count (6 is no power of two)."""

    def __init__(
        self, heads: int = 4, theta: float = 10000.0, fields: Mapping[str, float] | None = None, seq: int = SEQ_LENGTH
    ) -> None:
        self.heads = heads
        self.theta = theta
        self.seq = seq
        self.fields = dict(fields or {})

    def field(self, name: str) -> float:
        """The number for a config field, from the words in its name."""
        lower = name.lower()
        if lower in self.fields:
            return self.fields[lower]
        for words, value in _GUESSES:
            if any(w in lower for w in words):
                return self.theta if value == 10000.0 else value
        if "head" in lower:
            return self.heads
        if lower == "base":
            return self.theta
        if any(w in lower for w in ("hidden", "embd", "embed", "d_model", "dim", "model_size")):
            return self.heads * 8
        return 4

    def text(self, source: str) -> Any:
        """The number of a source text over config fields."""
        try:
            return self._node(ast.parse(source, mode="eval").body)
        except SyntaxError as error:
            raise Unevaluable(source) from error

    def _node(self, node: ast.expr) -> Any:
        handler: Callable[[Any], Any] | None = getattr(self, f"_{type(node).__name__}", None)
        if handler is None:
            raise Unevaluable(ast.unparse(node))
        return handler(node)

    def _Constant(self, node: ast.Constant) -> Any:
        return node.value

    def _Attribute(self, node: ast.Attribute) -> Any:
        return self.field(node.attr)

    def _Name(self, node: ast.Name) -> Any:
        return self.field(node.id)

    def _Subscript(self, node: ast.Subscript) -> Any:
        if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
            return self.field(node.slice.value)
        return self.field(ast.unparse(node.value).rsplit(".", 1)[-1])

    def _BinOp(self, node: ast.BinOp) -> Any:
        return _PYTHON[type(node.op)](self._node(node.left), self._node(node.right))

    def _UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = self._node(node.operand)
        return not value if isinstance(node.op, ast.Not) else -value

    def _BoolOp(self, node: ast.BoolOp) -> Any:
        value: Any = None
        for part in node.values:
            value = self._node(part)
            if bool(value) is isinstance(node.op, ast.Or):
                break
        return value

    def _IfExp(self, node: ast.IfExp) -> Any:
        return self._node(node.body if self._node(node.test) else node.orelse)

    def _Compare(self, node: ast.Compare) -> Any:
        left, right = self._node(node.left), self._node(node.comparators[0])
        sign = type(node.ops[0])
        if sign not in _COMPARE:
            raise Unevaluable(ast.unparse(node))
        return _COMPARE[sign](left, right)

    def _Call(self, node: ast.Call) -> Any:
        name = ast.unparse(node.func)
        if name == "getattr":
            return self.field(str(self._node(node.args[1])))
        if name.endswith(".get") and node.args:
            return self.field(str(self._node(node.args[0])))
        function = _CALLS.get(name.rsplit(".", 1)[-1])
        if function is None:
            raise Unevaluable(name)
        return function(*[self._node(a) for a in node.args])

    def size(self, size: Poly) -> float:
        values: dict[str, float] = {BATCH: BATCH_SIZE, SEQ: self.seq}
        for symbol in size.symbols - {BATCH, SEQ}:
            values[symbol] = self.text(symbol)
        found = size.evaluate(values)
        return int(found) if found.denominator == 1 else float(found)


_PYTHON: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "sqrt": math.sqrt,
    "log2": math.log2,
    "log": math.log,
    "floor": math.floor,
    "ceil": math.ceil,
    "max": max,
    "min": min,
    "abs": abs,
    "round": round,
    "exp": math.exp,
    "pow": pow,
}


class Evaluator:
    """Evaluates values at a point; `leaves` replaces chosen values by given arrays."""

    def __init__(self, point: Point, leaves: Mapping[int, Array] | None = None) -> None:
        self.point = point
        self.memo: dict[int, Any] = dict(leaves or {})

    def __call__(self, value: Value) -> Any:
        if id(value) not in self.memo:
            try:
                with np.errstate(all="ignore"):
                    self.memo[id(value)] = self._compute(value)
            except (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError, OverflowError) as error:
                raise Unevaluable(f"{value.op}: {error}") from error
        return self.memo[id(value)]

    def _compute(self, value: Value) -> Any:
        if isinstance(value, Scalar):
            return self._scalar(value)
        if isinstance(value, Mask):
            return mask_array(value, self.point)
        if isinstance(value, Sequence):
            if value.op == "slice":
                return slice(*[None if is_none(v) else int(self(v)) for v in value.items])
            return tuple(self(v) for v in value.items)
        if isinstance(value, Tensor):
            function = _OPS.get(value.op)
            if function is None:
                raise Unevaluable(value.op)
            return function(self, value)
        raise Unevaluable(value.op)

    def _scalar(self, value: Scalar) -> Any:
        if value.known:
            return value.const
        if value.op == "finfo" or "finfo" in value.text:
            return NEGATIVE
        if value.op in ("dtype", "device", "string"):
            return None
        if value.size is not None:
            return self.point.size(value.size)
        return self.point.text(value.text)

    def positional(self, value: Value) -> list[Any]:
        count = len(value.args) - len(value.attrs.get("kw", ()))
        return [self(a) for a in value.args[:count]]

    def keywords(self, value: Value) -> dict[str, Any]:
        names = value.attrs.get("kw", ())
        return {
            n: self(a)
            for n, a in zip(names, value.args[len(value.args) - len(names) :], strict=True)
            if n not in ("device", "dtype", "out")
        }

    def shape(self, value: Tensor) -> tuple[int, ...]:
        if value.shape is None:
            raise Unevaluable(value.op)
        return tuple(int(self.point.size(s)) for s in value.shape)


def mask_array(mask: Mask, point: Point) -> Array:
    rows, columns = np.arange(point.seq)[:, None], np.arange(point.seq)[None, :]
    allowed = columns <= rows
    if mask.kind == "sliding":
        allowed &= columns > rows - int(point.field("window"))
    elif mask.kind != "causal":
        raise Unevaluable(mask.kind)
    return np.where(allowed, 0.0, NEGATIVE)[None, None]


Op = Callable[[Evaluator, Tensor], Any]
_OPS: dict[str, Op] = {}


def _op(*names: str) -> Callable[[Op], Op]:
    def register(function: Op) -> Op:
        for name in names:
            _OPS[name] = function
        return function

    return register


def _simple(function: Callable[..., Any]) -> Op:
    def run(e: Evaluator, v: Tensor) -> Any:
        return function(
            *[np.asarray(a) if a is not None else a for a in e.positional(v)[: function.__code__.co_argcount]]
        )

    return run


_UFUNCS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: np.abs(x),
    "neg": lambda x: -x,
    "exp": lambda x: np.exp(x),
    "log": lambda x: np.log(x),
    "sqrt": lambda x: np.sqrt(x),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": lambda x: np.sin(x),
    "cos": lambda x: np.cos(x),
    "tanh": lambda x: np.tanh(x),
    "reciprocal": lambda x: 1 / x,
    "square": lambda x: x * x,
    "logical_not": lambda x: ~x.astype(bool),
    "floor": lambda x: np.floor(x),
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "floor_divide": lambda x, y: x // y,
    "remainder": lambda x, y: x % y,
    "rsub": lambda x, y: y - x,
    "pow": lambda x, y: np.power(x.astype(float), y),
    "maximum": lambda x, y: np.maximum(x, y),
    "minimum": lambda x, y: np.minimum(x, y),
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "logical_and": lambda x, y: x.astype(bool) & y.astype(bool),
    "logical_or": lambda x, y: x.astype(bool) | y.astype(bool),
    "where": lambda c, x, y: np.where(c.astype(bool), x, y),
    "masked_fill": lambda x, c, y: np.where(c.astype(bool), y, x),
    "outer": lambda x, y: np.outer(x, y),
    "matmul": lambda x, y: x @ y,
    "bmm": lambda x, y: x @ y,
    "zeros_like": lambda x: np.zeros_like(x),
    "ones_like": lambda x: np.ones_like(x),
    "full_like": lambda x, y: np.full_like(x, y),
}
for _name, _function in _UFUNCS.items():
    _OPS[_name] = _simple(_function)


@_op(
    "to",
    "float",
    "type",
    "type_as",
    "contiguous",
    "clone",
    "half",
    "bfloat16",
    "double",
    "detach",
    "dropout",
    "positive",
    "cpu",
    "cuda",
    "requires_grad",
    "copy",
)
def _pass(e: Evaluator, v: Tensor) -> Any:
    return e(v.args[0])


@_op("long", "int")
def _long(e: Evaluator, v: Tensor) -> Any:
    return np.asarray(e(v.args[0])).astype(np.int64)


@_op("bool")
def _bool(e: Evaluator, v: Tensor) -> Any:
    return np.asarray(e(v.args[0])).astype(bool)


@_op("positions")
def _positions(e: Evaluator, v: Tensor) -> Any:
    return np.tile(np.arange(e.point.seq), (BATCH_SIZE, 1))


@_op("ones", "zeros", "empty", "full")
def _filled(e: Evaluator, v: Tensor) -> Any:
    fill = {"ones": 1.0, "zeros": 0.0, "empty": 0.0}.get(v.op)
    if fill is None:
        fill = e(v.args[1]) if len(v.args) - len(v.attrs.get("kw", ())) > 1 else e.keywords(v)["fill_value"]
    return np.full(e.shape(v), fill)


@_op("tensor", "as_tensor", "array")
def _tensor(e: Evaluator, v: Tensor) -> Any:
    return np.asarray(e(v.args[0]), dtype=float)


@_op("arange")
def _arange(e: Evaluator, v: Tensor) -> Any:
    return np.arange(*e.positional(v))


@_op("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze")
def _reshape(e: Evaluator, v: Tensor) -> Any:
    return np.reshape(e(v.args[0]), e.shape(v))


@_op("permute")
def _permute(e: Evaluator, v: Tensor) -> Any:
    return np.transpose(e(v.args[0]), v.attrs["order"])


@_op("expand", "broadcast_to", "expand_as")
def _expand(e: Evaluator, v: Tensor) -> Any:
    return np.broadcast_to(e(v.args[0]), e.shape(v))


@_op("repeat", "tile")
def _repeat(e: Evaluator, v: Tensor) -> Any:
    times = [e(a) for a in v.args[1:]]
    return np.tile(e(v.args[0]), tuple(times[0]) if isinstance(times[0], tuple) else tuple(int(t) for t in times))


@_op("repeat_interleave")
def _repeat_interleave(e: Evaluator, v: Tensor) -> Any:
    args, named = e.positional(v), e.keywords(v)
    dim = named.get("dim", args[2] if len(args) > 2 else None)
    return np.repeat(args[0], int(named.get("repeats", args[1] if len(args) > 1 else 1)), axis=dim)


@_op("getitem")
def _getitem(e: Evaluator, v: Tensor) -> Any:
    index = e(v.args[1])
    parts = (
        index if isinstance(index, tuple) and isinstance(v.args[1], Sequence) and v.args[1].op == "index" else (index,)
    )
    fixed = tuple(
        list(p) if isinstance(p, tuple) else p.astype(int) if isinstance(p, np.ndarray) and p.dtype != bool else p
        for p in parts
    )
    return np.asarray(e(v.args[0]))[fixed]


@_op("setitem")
def _setitem(e: Evaluator, v: Tensor) -> Any:
    array = np.array(e(v.args[0]), dtype=float)
    array[e(v.args[1])] = e(v.args[2])
    return array


@_op("row")
def _row(e: Evaluator, v: Tensor) -> Any:
    return np.asarray(e(v.args[0]))[0]


@_op("piece")
def _piece(e: Evaluator, v: Tensor) -> Any:
    if "start" not in v.attrs:
        raise Unevaluable("split")
    start, size = int(e.point.size(v.attrs["start"])), int(e.point.size(v.attrs["size"]))
    return np.take(e(v.args[0]), np.arange(start, start + size), axis=v.attrs["dim"])


@_op("cat", "stack")
def _join(e: Evaluator, v: Tensor) -> Any:
    args, named = e.positional(v), e.keywords(v)
    dim = int(named.get("dim", args[1] if len(args) > 1 else 0))
    parts = [np.asarray(p) for p in (args or [named["tensors"]])[0]]
    return np.concatenate(parts, axis=dim) if v.op == "cat" else np.stack(parts, axis=dim)


@_op("tril", "triu")
def _triangle(e: Evaluator, v: Tensor) -> Any:
    args, named = e.positional(v), e.keywords(v)
    k = int(named.get("diagonal", args[1] if len(args) > 1 else 0))
    return (np.tril if v.op == "tril" else np.triu)(args[0], k)


@_op("cumsum")
def _cumsum(e: Evaluator, v: Tensor) -> Any:
    args, named = e.positional(v), e.keywords(v)
    return np.cumsum(args[0], axis=int(named.get("dim", args[1] if len(args) > 1 else 0)))


@_op("max", "min", "sum", "mean", "amax", "amin")
def _reduce(e: Evaluator, v: Tensor) -> Any:
    args, named = e.positional(v), e.keywords(v)
    if v.op in ("max", "min") and len(args) > 1 and isinstance(args[1], np.ndarray):
        return (np.maximum if v.op == "max" else np.minimum)(args[0], args[1])
    dim = named.get("dim", args[1] if len(args) > 1 else None)
    keep = bool(named.get("keepdim", args[2] if len(args) > 2 else False))
    name = v.op.removeprefix("a") if v.op in ("amax", "amin") else v.op
    return getattr(np, name)(args[0], axis=dim, keepdims=keep)


@_op("clamp", "clip")
def _clamp(e: Evaluator, v: Tensor) -> Any:
    args, named = e.positional(v), e.keywords(v)
    low = named.get("min", args[1] if len(args) > 1 else None)
    high = named.get("max", args[2] if len(args) > 2 else None)
    return np.clip(args[0], low, high) if low is not None or high is not None else args[0]


@_op("einsum")
def _einsum(e: Evaluator, v: Tensor) -> Any:
    return np.einsum(e(v.args[0]).replace(" ", ""), *[e(a) for a in v.args[1:]])


@_op("baddbmm")
def _baddbmm(e: Evaluator, v: Tensor) -> Any:
    args, named = e.positional(v), e.keywords(v)
    return named.get("beta", 1) * args[0] + named.get("alpha", 1) * (args[1] @ args[2])


@_op("parameter")
def _parameter(e: Evaluator, v: Tensor) -> Any:
    raise Unevaluable("parameter")


@_op("gather")
def _gather(e: Evaluator, v: Tensor) -> Any:
    args, named = e.positional(v), e.keywords(v)
    table, index = np.asarray(args[0]), np.asarray(named.get("index", args[-1])).astype(int)
    return np.take_along_axis(table, index, axis=int(named.get("dim", args[1])))


@_op("rope_init")
def _rope_init(e: Evaluator, v: Tensor) -> Any:
    """transformers' default inverse frequencies over the whole head."""
    dim = int(e.point.field("head_dim"))
    return 1.0 / (e.point.field("rope_theta") ** (np.arange(0, dim, 2) / dim))


@_op("roll", "flip")
def _roll(e: Evaluator, v: Tensor) -> Any:
    args, named = e.positional(v), e.keywords(v)
    if v.op == "flip":
        return np.flip(args[0], named.get("dims", args[1] if len(args) > 1 else None))
    return np.roll(args[0], named.get("shifts", args[1]), named.get("dims", args[2] if len(args) > 2 else None))
