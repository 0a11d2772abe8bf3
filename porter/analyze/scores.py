"""Read an attention's scores: what is scaled, masked, capped and added between the product and the softmax."""

from __future__ import annotations

import numpy as np

from porter.analyze import scalars
from porter.analyze.core import CASTS, Core, NotUnderstood, tensor_of
from porter.analyze.evaluate import NEGATIVE, Evaluator
from porter.analyze.point import Point, Unevaluable
from porter.analyze.values import Mask, Scalar, Tensor, Value, const, is_none

IGNORED = frozenset(
    {
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
        "scaling",
        "dropout",
        "dropout_p",
        "is_causal",
        "output_attentions",
        "use_cache",
        "position_ids",
        "cache_position",
        "position_embeddings",
        "enable_gqa",
        "sliding_window",
        "softcap",
        "s_aux",
        "logits_soft_cap",
        "target_dtype",
        "use_top_left_mask",
        "seq_idx",
        "past_key_values",
        "past_key_value",
        "layer_past",
        "deterministic",
        "return_dict",
    }
)


def softmax_of(product: Tensor) -> Tensor | None:
    """The softmax whose result is multiplied with the values, if this product is one of attention."""
    operands = product.args[1:] if product.op == "einsum" else product.args[:2]
    if len(operands) < 2:
        return None
    value: Value = operands[0]
    for _ in range(30):
        if isinstance(value, Tensor) and value.op == "softmax":
            if value.shape is None:
                raise NotUnderstood(f"the layout of its scores is unknown{_because(value)}")
            return value if _has_two_token_axes(value) and _is_over_last(value) else None
        if value.op in CASTS or value.op in ("dropout", "view", "reshape"):
            value = value.args[0]
        else:
            return None
    return None


def _because(value: Tensor) -> str:
    reasons = [v.attrs["why"] for v in value.walk() if "why" in v.attrs]
    return f" ({reasons[-1]})" if reasons else ""


def _is_over_last(value: Tensor) -> bool:
    """Whether a softmax runs over its last axis."""
    names = value.attrs.get("kw", ())
    named = dict(zip(names, value.args[len(value.args) - len(names) :], strict=True))
    dim = named.get("dim", value.args[1] if len(value.args) - len(names) > 1 else None)
    number = scalars.number(dim) if dim is not None else None
    return number is not None and value.shape is not None and number in (-1, len(value.shape) - 1)


def _has_two_token_axes(value: Tensor) -> bool:
    return value.shape is not None and sum("<seq>" in s.symbols for s in value.shape) >= 2


def from_interface(value: Tensor) -> Core:
    given: dict[str, Value] = value.attrs["given"]
    strange = [k for k, v in given.items() if k not in IGNORED and not _off(v)]
    if strange:
        raise NotUnderstood(f"the attention call passes {', '.join(sorted(strange))}, which no trait stands for")
    query, key, content = (tensor_of(given.get(k), k) for k in ("query", "key", "value"))
    core = Core(value, query, key, content)
    scaling = given.get("scaling")
    if scaling is None or is_none(scaling):
        core.default_scale = True
    else:
        core.scale = [("mul", scaling)]
    for name in ("softcap", "logits_soft_cap"):
        if name in given and not is_none(given[name]):
            core.softcap = given[name]
    if "s_aux" in given and not is_none(given["s_aux"]):
        core.sinks = given["s_aux"]
    mask = given.get("attention_mask")
    causal = given.get("is_causal")
    if mask is None or is_none(mask):
        if not (isinstance(causal, Scalar) and causal.known and causal.const is True):
            raise NotUnderstood("the attention has no causal mask")
        core.causal = True
    elif isinstance(mask, Tensor):
        core.addends.append((mask, []))
    window = given.get("sliding_window")
    if window is not None and not is_none(window):
        core.window = window
    return core


def _off(value: Value) -> bool:
    return isinstance(value, Scalar) and value.known and (value.const is None or value.const is False)


def from_product(product: Tensor) -> Core:
    softmax = softmax_of(product)
    assert softmax is not None
    operands = product.args[1:] if product.op == "einsum" else product.args
    core = Core(product, product, product, tensor_of(operands[1], "value"))
    scale: list[tuple[str, Value]] = []
    value: Value = softmax.args[0]
    for _ in range(60):
        if value.op in ("matmul", "bmm", "einsum", "baddbmm"):
            break
        value = _peel(core, value, scale)
    else:
        raise NotUnderstood("the scores of the softmax are not a product of queries and keys")
    if value.op == "baddbmm":
        names = value.attrs.get("kw", ())
        extra = dict(zip(names, value.args[3:], strict=True))
        bias = value.args[0]
        beta = extra.get("beta", const(1))
        if isinstance(bias, Tensor) and not (isinstance(beta, Scalar) and beta.known and beta.const == 0):
            core.addends.append((bias, [*scale, ("mul", beta)]))
        scale.append(("mul", _number(extra.get("alpha", const(1)))))
        query, key = value.args[1], value.args[2]
    else:
        query, key = value.args[1:3] if value.op == "einsum" else value.args[:2]
    core.query, core.key = tensor_of(query, "query"), tensor_of(key, "key")
    _check_orientation(core, value.op)
    core.scale = scale
    if not all(isinstance(factor, Scalar) for _, factor in scale):
        raise NotUnderstood("the scores are scaled by something that is no number of the config")
    return core


def _check_orientation(core: Core, op: str) -> None:
    """Scores contract the head size, and the weighted sum runs over the keys."""
    query, key, content = core.query.shape, core.key.shape, core.value.shape
    if op == "einsum" or core.output.op == "einsum":
        return
    if not query or not key or not content or len(key) < 2 or len(content) < 2:
        raise NotUnderstood("the layout of queries, keys or values is unknown")
    if key[-2] != query[-1] or "<seq>" not in key[-1].symbols or "<seq>" not in content[-2].symbols:
        raise NotUnderstood("the scores do not multiply queries with transposed keys")


def _peel(core: Core, value: Value, scale: list[tuple[str, Value]]) -> Value:
    """Take one operation off the scores, remembering what it means; returns what is inside."""
    op, args = value.op, value.args
    if op in CASTS or op in ("view", "reshape", "dropout", "unsqueeze", "squeeze"):
        return args[0]
    if op == "getitem" and isinstance(args[0], Tensor):
        return args[0]
    if op == "add_mask":
        _before_softcap(core)
        core.addends.append((tensor_of(args[1], "mask"), list(scale)))
        return args[0]
    if op in ("add", "sub"):
        inner, extra = _scores_and_rest(args)
        if isinstance(extra, Tensor) and op == "add":
            _before_softcap(core)
            core.addends.append((extra, list(scale)))
            return inner
    if op == "mul" and any(a.op == "tanh" for a in args):
        return _peel_softcap(core, value, scale)
    if op in ("mul", "div"):
        inner, factor = _scores_and_rest(args)
        factor = _number(factor)
        if isinstance(factor, Scalar):
            scale.append((op, factor))
            return inner
        if op == "mul" and isinstance(factor, Tensor) and factor.sizes_only:
            core.zeroed.append(factor)
            return inner
    if op == "masked_fill" or op == "where":
        return _peel_fill(core, value, scale)
    if op in ("max", "maximum", "clamp", "clip") and _only_floors(value):
        return args[0]
    raise NotUnderstood(f"the scores go through {op}, which is no part of attention that porter knows")


def _before_softcap(core: Core) -> None:
    """Masks and biases come after the softcap; one inside of it would be capped too."""
    if core.softcap is not None:
        raise NotUnderstood("the softcap comes after the mask or the position bias")


def _is_low(value: Value) -> bool:
    """Whether a fill is so low that softmax gives nothing."""
    try:
        return bool(np.all(np.asarray(Evaluator(Point())(value), dtype=float) <= -1e4))
    except (Unevaluable, TypeError, ValueError):
        return False


def _only_floors(value: Value) -> bool:
    """`max(scores, lowest)`: a floor that only undoes the overflow of masks."""
    names = value.attrs.get("kw", ())
    return len(value.args) == 2 and (not names or names == ("min",)) and _is_low(value.args[1])


def _number(value: Value) -> Value:
    """The scalar in a tensor without dims: `torch.full([], x)` and `torch.tensor(x)` are x."""
    if isinstance(value, Tensor) and value.shape == () and value.op in ("full", "tensor", "as_tensor"):
        return value.args[1] if value.op == "full" else value.args[0]
    if isinstance(value, Tensor) and value.shape == () and value.op in CASTS | {"sqrt"}:
        inner = _number(value.args[0])
        return scalars.call("math.sqrt", None, [inner]) if value.op == "sqrt" and isinstance(inner, Scalar) else inner
    if isinstance(value, Tensor) and value.shape == () and value.op in ("div", "mul"):
        left, right = _number(value.args[0]), _number(value.args[1])
        if isinstance(left, Scalar) and isinstance(right, Scalar):
            return scalars.binary(value.op, left, right)
    return value


def _scores_and_rest(args: tuple[Value, ...]) -> tuple[Value, Value]:
    left, right = args[0], args[1]
    if isinstance(left, Tensor) and not left.sizes_only and not isinstance(left, Mask):
        return left, right
    return right, left


def _peel_softcap(core: Core, value: Value, scale: list[tuple[str, Value]]) -> Value:
    tanh, cap = value.args if value.args[0].op == "tanh" else value.args[::-1]
    inside = tanh.args[0]
    same = inside.op == "div" and scalars.text(inside.args[1]) == scalars.text(cap)
    if not same or scale:
        raise NotUnderstood("tanh in the scores that is not cap * tanh(scores / cap)")
    core.softcap = cap
    return inside.args[0]


def _peel_fill(core: Core, value: Value, scale: list[tuple[str, Value]]) -> Value:
    """`masked_fill(scores, cond, low)` and `where(cond, scores, low)` as an additive mask."""
    if value.op == "masked_fill":
        inner, condition = value.args[0], value.args[1]
        keep = False
    else:
        condition, first, second = value.args[:3]
        keep = isinstance(first, Tensor) and not first.sizes_only
        inner = first if keep else second
    low = value.args[2] if value.op == "masked_fill" else second if keep else first
    if not isinstance(condition, Tensor) or not _is_low(low):
        raise NotUnderstood("scores are filled under a condition, but not as a mask fills them")
    _before_softcap(core)
    mask = Tensor(
        op="where",
        args=(condition, const(0.0), const(NEGATIVE)) if keep else (condition, const(NEGATIVE), const(0.0)),
        shape=condition.shape,
        attrs={"sizes_only": condition.sizes_only},
    )
    core.addends.append((mask, list(scale)))
    return inner
