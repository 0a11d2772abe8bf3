"""Numbers for config fields, guessed from their names, and for source texts over them."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from porter.analyze.poly import BATCH, SEQ, Poly

BATCH_SIZE = 2
SEQ_LENGTH = 6


class Unevaluable(Exception):
    """A value that needs weights, data or an operation without a rule here."""


_KV_HEADS = ("kv_head", "key_value_head", "head_kv", "kv_n_head", "query_group")
# Plausible sizes by the words in a config field's name; only their ratios matter.
_GUESSES: tuple[tuple[tuple[str, ...], float], ...] = (
    (("layer_idx", "layer_id"), 1),
    (("pad_token", "token_id"), 1),
    (("theta", "rope_base", "emb_base", "rotary_base"), 10000.0),
    (("partial", "rotary_pct", "rotary_factor"), 0.5),
    (("rotary_dim", "rotary_ndims"), 4),
    (("eps",), 1e-5),
    (("head_dim", "head_size", "kv_channels", "attention_head_dim"), 8),
    (_KV_HEADS, 2),
    (("per_tok", "top_k", "topk"), 2),
    (("expert",), 4),
    (("window",), 3),
    (("max_position", "n_positions", "n_ctx", "max_seq", "seq_length", "max_sequence"), 16),
    (("intermediate", "ffn", "inner", "n_inner"), 64),
    (("vocab",), 96),
    (("n_layer", "num_layers", "hidden_layers"), 2),
    (("soft_cap", "softcap"), 30.0),
)


def guess(name: str) -> float | None:
    """A plausible number for a config field of that name, if its words say what it counts."""
    return next((value for words, value in _GUESSES if any(w in name.lower() for w in words)), None)


def _counts_kv(name: str) -> bool:
    return any(w in name for w in _KV_HEADS)


class Point:
    """One assignment of numbers to config fields; `heads` sets the head count (6 is no power of two)."""

    def __init__(
        self, heads: int = 4, theta: float = 10000.0, fields: Mapping[str, float] | None = None, seq: int = SEQ_LENGTH
    ) -> None:
        self.heads = heads
        self.theta = theta
        self.seq = seq
        self.fields = dict(fields or {})
        self.times = 1

    def doubled(self) -> Point:
        """The same point with twice as many heads, of keys and values too."""
        fields = {name: 2 * value if _counts_kv(name) else value for name, value in self.fields.items()}
        point = Point(2 * self.heads, self.theta, fields, self.seq)
        point.times = 2 * self.times
        return point

    def field(self, name: str) -> float:
        """The number for a config field, from the words in its name."""
        lower = name.lower()
        if lower in self.fields:
            return self.fields[lower]
        known = guess(lower)
        if known is not None:
            return self.theta if known == 10000.0 else known * self.times if _counts_kv(lower) else known
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
            counted = source.replace(SEQ, str(self.seq)).replace(BATCH, str(BATCH_SIZE))
            return self._node(ast.parse(counted, mode="eval").body)
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
