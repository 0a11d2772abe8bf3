"""Recognise attention by data flow: softmax over query-key products, whatever the spelling, into one traits record.

Every reading is checked on numbers: masks, ALiBi slopes, rotations and head layouts are evaluated on small sizes and
compared with what the runtime's layer will compute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from porter.analyze import scalars
from porter.analyze.evaluate import BATCH_SIZE, NEGATIVE, SEQ_LENGTH, Evaluator, Point, Unevaluable
from porter.analyze.facts import World
from porter.analyze.poly import Poly
from porter.analyze.values import Mask, Scalar, Sequence, Tensor, Value, const, is_none

LAYOUT = frozenset(
    [
        "view",
        "reshape",
        "permute",
        "contiguous",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "expand",
        "broadcast_to",
        "expand_as",
        "repeat_interleave",
        "repeat",
        "to",
        "type",
        "type_as",
        "float",
        "clone",
        "getitem",
        "piece",
        "row",
        "shard",
        "bfloat16",
        "half",
    ]
)
CASTS = frozenset(["to", "type", "type_as", "float", "contiguous", "clone", "half", "bfloat16", "double"])
PROJECTED = frozenset({"linear", "embedding", "attention", "rms_norm", "layer_norm", "paged_attention"})
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
    }
)


class NotUnderstood(Exception):
    """Why an attention could not be read."""


class Inconsistent(NotUnderstood):
    """The path does not run at the chosen sizes."""


@dataclass(eq=False)
class Core:
    """One attention on one path: its inputs before layout changes, and its traits as values of the file."""

    output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scale: list[tuple[str, Value]] = field(default_factory=list)  # ("mul"|"div", factor)
    window: Value | None = None
    by_key: Mask | None = None
    softcap: Value | None = None
    sinks: Value | None = None
    alibi: Tensor | None = None
    alibi_scale: list[tuple[str, Value]] = field(default_factory=list)
    alibi_dtype: str = ""
    default_scale: bool = False
    causal: bool = False  # said by the call itself, without a mask
    rotation: Rotation | None = None
    fused: str = ""  # "", contiguous or grouped
    heads: Poly | None = None
    kv_heads: Poly | None = None
    head_dim: Poly | None = None
    addends: list[tuple[Tensor, list[tuple[str, Value]]]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Rotation:
    """RoPE between projection and attention: what it turned, how, and the values before it."""

    query: Tensor
    key: Tensor
    interleaved: bool
    rotary_dim: int
    full: bool
    from_config: bool
    base: float
    fields: frozenset[str]
    sizes: tuple[Scalar, ...] = ()


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
                cores.append(_from_interface(value))
            elif value.op in ("permute",) and value.args and value.args[0].op == "attention":
                inner = value.args[0]
                if isinstance(inner, Tensor) and id(inner) not in seen:
                    seen.add(id(inner))
                    cores.append(_from_interface(inner))
            elif value.op in ("matmul", "bmm", "einsum") and _softmax_of(value) is not None:
                cores.append(_from_product(value))
    point = point_for(world)
    for core in cores:
        _complete_somewhere(core, point)
    return cores


def _complete_somewhere(core: Core, point: Point) -> None:
    """Read a core at a point with grouped heads; if the path itself forbids those, with as many as query heads."""
    before = dict(core.__dict__)
    try:
        complete(core, point)
    except Inconsistent:
        core.__dict__.update(before)
        fields = {name: float(point.heads) for name in ("num_kv_heads", "num_key_value_heads", "n_head_kv")}
        complete(core, Point(point.heads, fields={**point.fields, **fields}))


def point_for(world: World) -> Point:
    """A point at which the conditions of the path hold as they were taken, as far as numbers decide them."""
    best: tuple[int, Point] | None = None
    flags = {
        k.removeprefix("config."): float(v) for k, v in world.decisions if k.removeprefix("config.").isidentifier()
    }
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


# -- reading the scores ----------------------------------------------------------------------------


def _softmax_of(product: Tensor) -> Tensor | None:
    """The softmax whose result is multiplied with the values, if this product is one of attention."""
    operands = product.args[1:] if product.op == "einsum" else product.args[:2]
    if len(operands) < 2:
        return None
    value: Value = operands[0]
    for _ in range(30):
        if isinstance(value, Tensor) and value.op == "softmax":
            return value if _has_two_token_axes(value) and _is_over_last(value) else None
        if value.op in CASTS or value.op in ("dropout", "view", "reshape"):
            value = value.args[0]
        else:
            return None
    return None


def _is_over_last(value: Tensor) -> bool:
    """Whether a softmax runs over its last axis."""
    names = value.attrs.get("kw", ())
    named = dict(zip(names, value.args[len(value.args) - len(names) :], strict=True))
    dim = named.get("dim", value.args[1] if len(value.args) - len(names) > 1 else None)
    number = scalars.number(dim) if dim is not None else None
    return number is not None and value.shape is not None and number in (-1, len(value.shape) - 1)


def _has_two_token_axes(value: Tensor) -> bool:
    return value.shape is not None and sum("<seq>" in s.symbols for s in value.shape) >= 2


def _from_interface(value: Tensor) -> Core:
    given: dict[str, Value] = value.attrs["given"]
    strange = [k for k, v in given.items() if k not in IGNORED and not _off(v)]
    if strange:
        raise NotUnderstood(f"the attention call passes {', '.join(sorted(strange))}, which no trait stands for")
    query, key, content = (_tensor(given.get(k), k) for k in ("query", "key", "value"))
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


def _tensor(value: Value | None, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise NotUnderstood(f"the {name} of the attention is not a tensor")
    return value


def _from_product(product: Tensor) -> Core:
    softmax = _softmax_of(product)
    assert softmax is not None
    operands = product.args[1:] if product.op == "einsum" else product.args
    core = Core(product, product, product, _tensor(operands[1], "value"))
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
    core.query, core.key = _tensor(query, "query"), _tensor(key, "key")
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
        core.addends.append((_tensor(args[1], "mask"), list(scale)))
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
        return bool(np.all(np.asarray(Evaluator(Point())(value), dtype=float) < -1e4))
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


# -- completing: masks, layouts, rotations ---------------------------------------------------------


def complete(core: Core, point: Point) -> None:
    """Read masks, ALiBi, RoPE and head layouts from the values, each checked on numbers."""
    causal = core.causal
    for addend, factors in core.addends:
        causal |= _read_addend(core, addend, factors, point)
    if not causal:
        raise NotUnderstood("the attention has no causal mask")
    _read_heads(core)
    core.rotation = _read_rotation(core, point)
    _read_sources(core, point)


def _read_addend(core: Core, addend: Tensor, factors: list[tuple[str, Value]], point: Point) -> bool:
    """What is added to the scores: a mask (returns True) or ALiBi."""
    if isinstance(addend, Mask):
        return _read_mask(core, addend)
    if addend.op == "add_mask":
        _read_addend(core, _tensor(addend.args[0], "bias"), factors, point)
        return _read_mask(core, addend.args[1])
    try:
        array = np.asarray(Evaluator(point)(addend), dtype=float)
    except Unevaluable as error:
        raise NotUnderstood(f"what is added to the scores can't be evaluated ({error})") from error
    masked = array < -1e4
    causal = False
    if masked.any():
        causal = _read_mask_array(core, masked)
        array = np.where(masked, 0.0, array)
    if np.abs(array).max() > 0:
        _read_alibi(core, addend, array, factors, point)
    return causal


def _read_mask(core: Core, mask: Value) -> bool:
    if not isinstance(mask, Mask):
        raise NotUnderstood("a mask that is no tensor")
    if mask.kind == "by_key":
        kinds = {m.kind for m in mask.args[1:] if isinstance(m, Mask)}
        if not kinds <= {"causal", "sliding"}:
            raise NotUnderstood(f"the mask is {', '.join(sorted(kinds - {'causal', 'sliding'}))}, not causal")
        core.by_key = mask
    elif mask.kind == "sliding":
        core.window = core.window or mask.window
    elif mask.kind != "causal":
        raise NotUnderstood(f"the mask is {mask.kind}, not causal")
    return True


def _read_mask_array(core: Core, masked: Any) -> bool:
    square = masked.reshape(-1, *masked.shape[-2:])[:, -SEQ_LENGTH:, :SEQ_LENGTH]
    rows, columns = np.arange(SEQ_LENGTH)[:, None], np.arange(SEQ_LENGTH)[None, :]
    if square.shape[-2:] == (SEQ_LENGTH, SEQ_LENGTH) and all((s == (columns > rows)).all() for s in square):
        return True
    raise NotUnderstood("the mask is not plainly causal")


def standard_slopes(heads: int) -> list[float]:
    """ALiBi slopes (Press et al. 2022): a geometric series, interpolated for head counts that are no power of two."""
    power = 2 ** int(np.floor(np.log2(heads)))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]


def _read_alibi(core: Core, addend: Tensor, array: Any, factors: list[tuple[str, Value]], point: Point) -> None:
    heads = point.heads
    try:
        biases = np.broadcast_to(
            array.reshape(-1, heads, *array.shape[-2:])[:, :, -1, :SEQ_LENGTH],
            (array.size // (heads * array.shape[-2] * array.shape[-1]), heads, SEQ_LENGTH),
        )
    except ValueError as error:
        raise NotUnderstood("a bias on the scores that is not ALiBi") from error
    expected = np.asarray(standard_slopes(heads))[:, None] * np.arange(SEQ_LENGTH)
    shifted = biases - biases[..., :1]
    if not np.allclose(shifted, expected, rtol=1e-4, atol=1e-6):
        raise NotUnderstood("a bias on the scores that is not ALiBi with the standard slopes")
    if core.alibi is not None:
        raise NotUnderstood("two position biases on one attention")
    core.alibi, core.alibi_scale = addend, factors
    core.alibi_dtype = "bfloat16" if any(v.op == "bfloat16" for v in addend.walk()) else ""


def _read_heads(core: Core) -> None:
    """Head count and size from the query's shape as the product sees it."""
    shape = core.query.shape
    if shape is None:
        raise NotUnderstood("the layout of the queries is unknown")
    core.head_dim = shape[-1]
    rest = Poly.const(1)
    for size in shape[:-1]:
        rest = rest * size
    core.heads = rest.without_tokens()


def _strip(value: Tensor) -> list[Tensor]:
    """The chain of pure layout operations under a value, outermost first, ending at what they lay out."""
    chain = [value]
    while chain[-1].op in LAYOUT and isinstance(chain[-1].args[0], Tensor):
        chain.append(chain[-1].args[0])
    return chain


def _read_rotation(core: Core, point: Point) -> Rotation | None:
    """RoPE on queries and keys, if there is a standard one; another rotation stays in the port."""
    if not _turns(_strip(core.query)[-1]) or not _turns(_strip(core.key)[-1]):
        return None
    for query in _strip(core.query):
        for key in _strip(core.key):
            found = _rotation_of(query, key, point)
            if found is not None:
                return found
    return None


def _rotation_of(query: Tensor, key: Tensor, point: Point) -> Rotation | None:
    """The rotation that leads to these two values, if it is a standard one and the same for both."""
    before_query, before_key = _before_rotation(query, point), _before_rotation(key, point)
    if before_query is None or before_key is None:
        return None
    first = _classify(query, before_query, point)
    second = _classify(key, before_key, point)
    if first is None or first != second:
        return None
    interleaved, rotary, full = first
    from_config = _classify(query, before_query, point, theta=500.0) is None
    fields, sizes = _rope_fields(query, before_query)
    return Rotation(before_query, before_key, interleaved, rotary, full, from_config, 10000.0, fields, sizes)


def _turns(value: Value) -> bool:
    return any(v.op in ("cos", "sin", "polar") for v in value.walk(PROJECTED))


def depends_on_positions(value: Value) -> bool:
    return any(v.op in ("cos", "sin") and isinstance(v, Tensor) and v.sizes_only for v in value.walk(PROJECTED))


def _before_rotation(value: Tensor, point: Point) -> Tensor | None:
    """The nearest value from which sizes and positions alone lead to `value`."""
    for candidate in value.walk(PROJECTED):
        if not isinstance(candidate, Tensor) or candidate.sizes_only or candidate.shape is None:
            continue
        if depends_on_positions(candidate):
            continue
        try:
            e = Evaluator(point)
            e.memo[id(candidate)] = np.zeros(e.shape(candidate))
            e(value)
        except Unevaluable:
            continue
        return candidate
    return None


def _classify(value: Tensor, before: Tensor, point: Point, theta: float = 10000.0) -> tuple[bool, int, bool] | None:
    """(interleaved, rotated dims, all of them?) if `value` is the standard rotation of `before`, by numbers."""
    e = Evaluator(
        Point(point.heads, 10000.0, point.fields) if theta == 10000.0 else Point(point.heads, theta, point.fields)
    )
    start = np.random.default_rng(0).standard_normal(e.shape(before))
    e.memo[id(before)] = start
    laid = _relay(value, before, start, point)
    try:
        turned = np.asarray(e(value))
    except Unevaluable:
        return None
    if laid is None or laid.shape != turned.shape:
        return None
    dim = turned.shape[-1]
    position = _token_axis(turned.shape)
    if position is None:
        return None
    for rotary in range(dim, 0, -2):
        for interleaved in (False, True):
            if np.allclose(rotate(laid, rotary, interleaved, position), turned, atol=1e-4):
                return interleaved, rotary, rotary == dim
    return None


def _token_axis(shape: tuple[int, ...]) -> int | None:
    found = [i for i, s in enumerate(shape[:-1]) if s == SEQ_LENGTH and i > 0]
    return found[0] if found else None


def _relay(value: Tensor, before: Tensor, start: Any, point: Point) -> Any:
    """`before` in the layout of `value`: only its own axes moved."""
    e = Evaluator(point)
    shape = e.shape(value)
    if start.shape == shape:
        return start
    moved = np.moveaxis(start, 1, 2) if start.ndim == 4 else start
    if moved.shape == shape:
        return moved
    if start.ndim == 3 and len(shape) == 4 and start.shape[1] == shape[2]:
        return start.reshape(shape[0], shape[2], shape[1], shape[3]).swapaxes(1, 2)
    if start.size == int(np.prod(shape)):
        return start.reshape(shape)
    return None


def rotate(x: Any, rotary: int, interleaved: bool, axis: int) -> Any:
    """The standard rotation of the first `rotary` of the last axis, base 10000, positions along `axis`."""
    frequencies = 10000.0 ** (-np.arange(0, rotary, 2) / rotary)
    angles = np.arange(SEQ_LENGTH)[:, None] * frequencies
    angles = angles.reshape([1] * axis + [SEQ_LENGTH] + [1] * (x.ndim - axis - 2) + [rotary // 2])
    cos, sin = np.cos(angles), np.sin(angles)
    head, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
        out = np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(head.shape)
    else:
        a, b = head[..., : rotary // 2], head[..., rotary // 2 :]
        out = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return np.concatenate([out, rest], axis=-1)


def _rope_fields(value: Tensor, before: Tensor) -> tuple[frozenset[str], tuple[Scalar, ...]]:
    """The config texts that the rotation reads, and the sizes in it."""
    seen: set[int] = {id(v) for v in before.walk(PROJECTED)}
    scalars = [v for v in value.walk(PROJECTED) if isinstance(v, Scalar) and id(v) not in seen and not v.known]
    return frozenset(s.text for s in scalars if s.op in ("leaf", "config_item", "getattr")), tuple(scalars)


def _read_sources(core: Core, point: Point) -> None:
    """Follow q, k, v down to what projected them, and check on labels how their heads are laid out."""
    rotation = core.rotation
    query = rotation.query if rotation else core.query
    key = rotation.key if rotation else core.key
    chains = [_strip(query), _strip(key), _strip(core.value)]
    sources = [c[-1] for c in chains]
    core.query, core.key, core.value = query, key, core.value
    tables = [_labels(c[0], c[-1], point, core) for c in chains]
    heads, dim = point.size(core.heads or Poly.const(1)), point.size(core.head_dim or Poly.const(1))
    tables = [t.reshape(-1, int(dim)) for t in tables]
    if tables[0].shape[0] != heads:
        raise NotUnderstood("the queries are not laid out as heads")
    kept = [_ungroup(t, int(heads)) for t in tables]
    if len({k.shape[0] for k in kept[1:]}) != 1:
        raise NotUnderstood("keys and values have different numbers of heads")
    kv = kept[1].shape[0]
    if sources[0] is sources[1] is sources[2] and sources[0].op == "linear":
        core.fused = _fused_layout(tables[0], kept[1], kept[2])
    elif not all((k.ravel() == np.arange(k.size)).all() for k in (tables[0], kept[1], kept[2])):
        raise NotUnderstood("heads are taken from the projections in an order that is not contiguous")

    core.kv_heads = _kv_size(chains[1], int(kv), core, point)


def _labels(value: Tensor, source: Tensor, point: Point, core: Core) -> Any:
    """Which feature of `source` each [head, dim] of `value` holds, after checking that tokens stay in place."""
    e = Evaluator(point)
    shape = e.shape(source)
    width = int(np.prod(shape)) // (BATCH_SIZE * SEQ_LENGTH)
    axis = [i for i, s in enumerate(source.shape or ()) if s.has_tokens]
    labels = _feature_labels(shape, axis, width)
    e.memo[id(source)] = labels
    try:
        found = np.asarray(e(value))
    except Unevaluable as error:
        raise Inconsistent(f"the heads go through {error}") from error
    return _per_token(found, width)


def _feature_labels(shape: tuple[int, ...], token_axes: list[int], width: int) -> Any:
    """token * width + feature for every element, tokens counted over the token axes in their order."""
    rest = [i for i in range(len(shape)) if i not in token_axes]
    order = [*token_axes, *rest]
    flat = np.arange(int(np.prod(shape))).reshape([shape[i] for i in order])
    return np.transpose(flat, np.argsort(order))


def _per_token(found: Any, width: int) -> Any:
    """The features of token 0, after checking that every token carries the same features in the same order."""
    tokens = BATCH_SIZE * SEQ_LENGTH
    per = found.size // tokens
    rows = np.empty((tokens, per), dtype=int)
    owner, feature = found // width, found % width
    flat_owner, flat_feature = owner.ravel(), feature.ravel()
    for token in range(tokens):
        picked = flat_feature[flat_owner == token]
        if picked.size != per:
            raise NotUnderstood("heads mix tokens")
        rows[token] = picked
    if not (rows == rows[0]).all():
        raise NotUnderstood("heads are laid out differently from token to token")
    return rows[0]


def _ungroup(table: Any, heads: int) -> Any:
    """Undo repeat_kv: one row for each distinct head, each repeated equally often in a row."""
    rows = table.reshape(-1, table.shape[-1])
    distinct = [rows[0]]
    for row in rows[1:]:
        if not (row == distinct[-1]).all():
            distinct.append(row)
    times = rows.shape[0] // len(distinct)
    if (
        not (np.repeat(np.asarray(distinct), times, axis=0) == rows).all()
        if times * len(distinct) == len(rows)
        else True
    ):
        raise NotUnderstood("key-value heads are shared in an order that is not grouped")
    return np.asarray(distinct)


def _fused_layout(query: Any, key: Any, value: Any) -> str:
    """How one projection holds q, k and v."""
    total = np.concatenate([query.ravel(), key.ravel(), value.ravel()])
    if (total == np.arange(total.size)).all():
        return "contiguous"
    groups, dim = key.shape
    each = query.reshape(groups, -1, dim)
    per_group = np.concatenate([each, key[:, None], value[:, None]], axis=1)
    if (per_group.ravel() == np.arange(total.size)).all():
        return "grouped"
    raise NotUnderstood("one projection holds q, k and v in an order that is neither contiguous nor grouped by head")


def _kv_size(chain: list[Tensor], kv: int, core: Core, point: Point) -> Poly:
    """The number of key-value heads as a size: the one in the chain that evaluates to what the labels show."""
    if kv == 1:
        return Poly.const(1)
    for value in reversed(chain):
        for size in value.shape or ():
            free = size.without_tokens() if size.has_tokens else size
            if free is not None and free.symbols and point.size(free) == kv and free != core.head_dim:
                return free
    last = chain[-1].shape
    if last is not None and core.head_dim is not None:
        quotient = last[-1].divide(core.head_dim)
        if quotient is not None and point.size(quotient) == kv:
            return quotient
    raise NotUnderstood("the number of key-value heads is no size of the config")


__all__ = ["Core", "NotUnderstood", "Rotation", "Sequence", "find_cores"]
