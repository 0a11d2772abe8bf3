"""What each recorded operation computes, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from porter.analyze.point import BATCH_SIZE, Unevaluable
from porter.analyze.values import Sequence, Tensor

if TYPE_CHECKING:
    from porter.analyze.evaluate import Evaluator


Op = Callable[["Evaluator", Tensor], Any]
OPS: dict[str, Op] = {}


def _op(*names: str) -> Callable[[Op], Op]:
    def register(function: Op) -> Op:
        for name in names:
            OPS[name] = function
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
    "logical_xor": lambda x, y: x.astype(bool) ^ y.astype(bool),
    "bitwise_and": lambda x, y: x & y,
    "bitwise_or": lambda x, y: x | y,
    "bitwise_xor": lambda x, y: x.astype(int) ^ y.astype(int),
    "where": lambda c, x, y: np.where(c.astype(bool), x, y),
    "masked_fill": lambda x, c, y: np.where(c.astype(bool), y, x),
    "polar": lambda x, y: x * np.exp(1j * y),
    "view_as_complex": lambda x: x[..., 0] + 1j * x[..., 1],
    "view_as_real": lambda x: np.stack([x.real, x.imag], axis=-1),
    "outer": lambda x, y: np.outer(x, y),
    "matmul": lambda x, y: x @ y,
    "bmm": lambda x, y: x @ y,
    "zeros_like": lambda x: np.zeros_like(x),
    "ones_like": lambda x: np.ones_like(x),
    "full_like": lambda x, y: np.full_like(x, y),
}


for _name, _function in _UFUNCS.items():
    OPS[_name] = _simple(_function)


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


@_op("rearrange")
def _rearrange(e: Evaluator, v: Tensor) -> Any:
    apart = np.reshape(e(v.args[0]), tuple(int(e.point.size(s)) for s in v.attrs["apart"]))
    return np.reshape(np.transpose(apart, v.attrs["order"]), e.shape(v))


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
    return np.take_along_axis(table, index, axis=int(named["dim"] if "dim" in named else args[1]))


@_op("rope_init")
def _rope_init(e: Evaluator, v: Tensor) -> Any:
    """transformers' default inverse frequencies."""
    dim = int(e(v.args[1]))
    return 1.0 / (e.point.field("rope_theta") ** (np.arange(0, dim, 2) / dim))


@_op("roll", "flip")
def _roll(e: Evaluator, v: Tensor) -> Any:
    args, named = e.positional(v), e.keywords(v)
    if v.op == "flip":
        return np.flip(args[0], named.get("dims", args[1] if len(args) > 1 else None))
    return np.roll(args[0], named.get("shifts", args[1]), named.get("dims", args[2] if len(args) > 2 else None))
