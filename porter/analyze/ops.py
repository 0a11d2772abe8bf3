"""Shapes of the torch operations that modeling files use: one transfer function per operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import libcst as cst

from porter.analyze import scalars
from porter.analyze.poly import Poly, product
from porter.analyze.values import (
    ONE,
    SYMBOLIC,
    B,
    Config,
    Layer,
    Mapping,
    Mask,
    Repeated,
    S,
    Scalar,
    Sequence,
    Shape,
    Tensor,
    Value,
    const,
    is_none,
    symbol,
)

if TYPE_CHECKING:
    from porter.analyze.interp import Interp


@dataclass
class Call:
    """One operation: positional values (receiver first), keywords, and the node for refusals."""

    run: Interp | None
    name: str
    args: list[Value]
    kwargs: dict[str, Value]
    node: cst.CSTNode | None

    def get(self, position: int, name: str, default: Value | None = None) -> Value | None:
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[position] if position < len(self.args) else default

    def number(self, position: int, name: str, default: int | None = None) -> int | None:
        value = self.get(position, name)
        return default if value is None else scalars.number(value)

    @property
    def shape(self) -> Shape | None:
        return shape_of(self.args[0]) if self.args else None


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


# -- building and dispatch -------------------------------------------------------------------------


def shape_of(value: Value) -> Shape | None:
    if isinstance(value, Tensor):
        return value.shape
    return () if isinstance(value, Scalar) else None


def build(op: str, args: tuple[Value, ...], shape: Shape | None, node: cst.CSTNode | None, **attrs: Any) -> Tensor:
    """A tensor made by `op`; it is sizes-only when every tensor that it came from is."""
    tensors = [a for a in _nested(args) if isinstance(a, Tensor)]
    attrs.setdefault("sizes_only", all(t.sizes_only for t in tensors))
    return Tensor(op=op, args=args, shape=shape, node=node, attrs=attrs)


def _nested(args: tuple[Value, ...]) -> list[Value]:
    flat: list[Value] = []
    for value in args:
        flat += _nested(value.items) if isinstance(value, Sequence) else [value]
    return flat


def apply(
    run: Interp | None, name: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    """Run the transfer function of an operation; an unknown one gives a tensor without layout."""
    base = name.rstrip("_") if name not in ("__getitem__",) and not name.startswith("_") else name
    base = _ALIASES.get(base, base)
    if args and isinstance(args[0], Mask) and base in _MASK_KEEPS:
        return args[0]
    function = RULES.get(base)
    call = Call(run, base, args, kwargs, node)
    every = (*args, *kwargs.values())
    if function is None:
        return build("unknown", every, None, node, why=f"torch operation {name}", sizes_only=False, name=name)
    result = function(call)
    if isinstance(result, Value):
        return result
    return build(base, every, result, node, kw=tuple(kwargs))


def method(
    run: Interp, base: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    return apply(run, name, [base, *args], kwargs, node)


def torch_call(
    run: Interp, full: str, short: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    """A function of torch, torch.nn.functional or numpy."""
    if short in ("no_grad", "autocast", "inference_mode", "device", "Size", "dtype", "set_grad_enabled"):
        return args[0] if short == "Size" and args else const(None)
    if short in (
        "is_grad_enabled",
        "is_tracing",
        "is_compiling",
        "is_dynamo_compiling",
        "is_available",
        "is_autocast_enabled",
    ):
        return const(False)
    if short in ("get_default_dtype", "result_type", "promote_types", "get_autocast_gpu_dtype", "get_autocast_dtype"):
        return Scalar(op="dtype", text="<dtype>", attrs={"dtype": "same"})
    if short == "apply" and "Function" in full:
        return apply(run, "unknown", args, kwargs, node)
    if ("numpy" in full or full.startswith("np.")) and not any(isinstance(a, Tensor) for a in args):
        return scalars.call(full, scalars.MATH.get(short), args)
    for key in ("input", "x", "self"):
        if key in kwargs and not args:
            args = [kwargs.pop(key)]
    return apply(run, short, args, kwargs, node)


def attribute(base: Tensor, name: str, node: cst.CSTNode | None) -> Value:
    if name == "shape":
        return shape_value(base)
    if name in ("ndim",):
        return const(len(base.shape)) if base.shape is not None else Scalar(op="rank", text="rank")
    if name in ("dtype", "device"):
        return Scalar(op=name, args=(base,), text=f"<{name}>", attrs={"dtype": "same"})
    if name == "data":
        return base
    if name in ("T", "mT"):
        return apply(None, "transpose", [base, const(-2), const(-1)], {}, node)
    if name in ("type", "is_cuda", "requires_grad", "index") and (name == "is_cuda" or name == "requires_grad"):
        return const(False)
    return Value(op="tensor_method", args=(base,), attrs={"name": name})


def shape_value(base: Tensor) -> Value:
    if base.shape is None:
        return Value(op="unknown", args=(base,), attrs={"why": "the shape of a tensor whose layout is unknown"})
    items = tuple(
        Scalar(
            op="size",
            args=(base, const(i)),
            text=size.text(),
            size=size,
            const=int(size.number) if size.number is not None else SYMBOLIC,
        )
        for i, size in enumerate(base.shape)
    )
    return Sequence(op="shape", args=(base,), items=items, prefix=len(items))


def unpack(value: Value, count: int, node: cst.CSTNode) -> list[Value] | None:
    if isinstance(value, Sequence):
        return list(value.items)
    if isinstance(value, Tensor) and value.shape:
        return [item(None, value, const(i), node) for i in range(count)]
    if isinstance(value, Repeated):
        return [value.item] * count
    if isinstance(value, Value) and value.op == "unknown":
        return [Tensor(op="unknown", args=(value,), attrs=dict(value.attrs)) for _ in range(count)]
    if isinstance(value, Scalar) and not value.known:
        return [symbol(f"{value.text}[{i}]") for i in range(count)]
    return None


def row(value: Tensor, node: cst.CSTNode) -> Tensor:
    return build("row", (value,), value.shape[1:] if value.shape else None, node)


def item(run: Interp | None, base: Value, index: Value, node: cst.CSTNode) -> Value:
    """`base[index]` for any value."""
    if isinstance(base, Sequence):
        return _sequence_item(base, index)
    if isinstance(base, Mapping):
        return _mapping_item(base, index)
    if isinstance(base, Repeated):
        if isinstance(index, Sequence) and index.op == "slice":
            return base
        return base.item
    if isinstance(base, Layer) and base.kind in ("module_list", "sequential"):
        return item(run, base.params["items"], index, node)
    if isinstance(base, Mask):
        return base
    if isinstance(base, Tensor):
        return build("getitem", (base, index), index_shape(base, index), node)
    if isinstance(base, Scalar | Config):
        return Scalar(
            op="config_item",
            args=(base, index),
            text=f"{scalars.text(base)}[{scalars.text(index)}]",
            size=Poly.symbol(f"{scalars.text(base)}[{scalars.text(index)}]"),
        )
    return Value(op="unknown", args=(base,), attrs={"why": "an item of something not understood"})


def _sequence_item(base: Sequence, index: Value) -> Value:
    if isinstance(index, Sequence) and index.op == "slice":
        bounds = [scalars.number(v) if not is_none(v) else None for v in index.items]
        picked = base.items[slice(*bounds)]
        start = bounds[0] or 0
        return Sequence(
            op="part",
            args=(base,),
            items=picked,
            mutable=base.mutable,
            attrs={"slice": tuple(bounds)},
            prefix=min(base.prefix, len(picked)) if start == 0 else 0,
        )
    position = scalars.number(index)
    if position is not None and -len(base.items) <= position < len(base.items):
        return base.items[position]
    if position is None and base.items and not (isinstance(index, Scalar) and index.known):
        return base.items[0]
    return const(None)


def _mapping_item(base: Mapping, index: Value) -> Value:
    if isinstance(index, Scalar) and index.known:
        return base.items.get(index.const, Value(op="unknown", attrs={"why": f"no key {index.const!r}"}))
    if base.items and all(isinstance(v, Mask) for v in base.items.values()):
        return Mask(
            op="mask_by_key",
            kind="by_key",
            shape=(B, ONE, S, S),
            args=(index, *base.items.values()),
            attrs={"keys": tuple(base.items)},
        )
    key = scalars.text(index)
    if key in base.items:
        return base.items[key]
    values = list(base.items.values())
    return (
        values[0]
        if len(values) == 1
        else Value(op="select", args=(index, *values), attrs={"keys": tuple(base.items), "why": f"selected by {key}"})
    )


def index_shape(base: Tensor, index: Value) -> Shape | None:
    """Shape of `base[index]` by numpy's rules, for the forms that modeling files use."""
    if base.shape is None:
        return None
    parts = list(index.items) if isinstance(index, Sequence) and index.op == "index" else [index]
    used = sum(_consumes(p) for p in parts)
    shape: list[Poly] = []
    dims = list(base.shape)
    advanced: list[Shape] = []
    place: int | None = None
    for part in parts:
        if isinstance(part, Scalar) and part.const is Ellipsis:
            keep = len(base.shape) - used
            shape += dims[:keep]
            del dims[:keep]
        elif is_none(part):
            shape.append(ONE)
        elif isinstance(part, Sequence) and part.op == "slice":
            if not dims:
                return None
            shape.append(slice_size(dims.pop(0), part))
        elif isinstance(part, Tensor) or (isinstance(part, Sequence) and part.op == "tuple"):
            if not dims:
                return None
            place = len(shape) if place is None else place
            if isinstance(part, Tensor) and part.attrs.get("bool"):
                del dims[: len(part.shape or (ONE,)) - 1]
            dims.pop(0)
            advanced.append(part.shape or () if isinstance(part, Tensor) else (Poly.const(len(part.items)),))
        else:
            if not dims:
                return None
            dims.pop(0)
    if advanced and place is not None:
        found: Shape | None = advanced[0]
        for more in advanced[1:]:
            found = broadcast(found, more) if found is not None else None
        if found is None:
            return None
        shape[place:place] = list(found)
    return (*shape, *dims)


def _consumes(part: Value) -> int:
    if isinstance(part, Scalar) and part.known and (part.const is None or part.const is Ellipsis):
        return 0
    return 1


def slice_size(size: Poly, part: Sequence) -> Poly:
    lower, upper, step = part.items
    if is_none(lower) and is_none(upper) and is_none(step):
        return size
    start = _end(lower, size, Poly.const(0))
    stop = _end(upper, size, size)
    if start is None or stop is None:
        return Poly.symbol(f"slice({scalars.text(lower)}:{scalars.text(upper)})")
    length = stop - start
    pace = scalars.number(step) if not is_none(step) else 1
    if pace and pace > 1:
        first = start.number
        if first is not None and 0 <= first < pace and stop == size:
            length = size  # every pace-th from one of the first: an even share, as sizes divide
        return length.divide(Poly.const(pace)) or length
    if length.number is None and size.number is None and stop.number is not None and stop.number > 0:
        return length
    return length


def _end(value: Value, size: Poly, default: Poly) -> Poly | None:
    if is_none(value):
        return default
    if not isinstance(value, Scalar) or value.size is None:
        return None
    negative = value.size.terms and all(c < 0 for _, c in value.size.terms)
    return size + value.size if negative else value.size


def broadcast(left: Shape | None, right: Shape | None) -> Shape | None:
    if left is None or right is None:
        return None
    rank = max(len(left), len(right))
    a = (ONE,) * (rank - len(left)) + tuple(left)
    b = (ONE,) * (rank - len(right)) + tuple(right)
    return tuple(y if x == ONE else x for x, y in zip(a, b, strict=True))


def axis(number: int | None, rank: int) -> int | None:
    return None if number is None else number % rank if rank else 0


# -- rules: elementwise ----------------------------------------------------------------------------

_SAME = [
    "abs",
    "neg",
    "exp",
    "log",
    "log2",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "tanh",
    "sigmoid",
    "relu",
    "silu",
    "gelu",
    "softmax",
    "log_softmax",
    "erf",
    "pow_",
    "positive",
    "clone",
    "contiguous",
    "to",
    "float",
    "half",
    "double",
    "bfloat16",
    "type",
    "type_as",
    "long",
    "int",
    "bool",
    "detach",
    "requires_grad_",
    "cpu",
    "cuda",
    "masked_fill",
    "fill",
    "clamp",
    "clip",
    "dropout",
    "square",
    "reciprocal",
    "sign",
    "round",
    "floor",
    "ceil",
    "isnan",
    "isinf",
    "nan_to_num",
    "tril",
    "triu",
    "cumsum",
    "cumprod",
    "softplus",
    "normalize",
    "relu6",
    "hardtanh",
    "leaky_relu",
    "elu",
    "mish",
    "index_add",
    "index_copy",
    "scatter",
    "scatter_add",
    "copy",
    "zero",
    "uniform",
    "normal",
    "bernoulli",
    "logical_not",
    "roll",
    "flip",
    "sort_",
    "softsign",
    "log1p",
    "expm1",
    "exponential",
    "layer_norm",
    "rms_norm",
    "scatter_reduce",
    "index_fill",
    "is_nonzero",
    "atan",
    "tan",
    "sinc",
    "logit",
]


@rule(*_SAME)
def _same(call: Call) -> Any:
    if call.name == "dropout":
        return call.args[0]
    return call.shape


_PAIRWISE = [
    "add",
    "sub",
    "mul",
    "div",
    "floor_divide",
    "remainder",
    "pow",
    "maximum",
    "minimum",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_and",
    "logical_or",
    "logical_xor",
    "atan2",
    "true_divide",
    "where_",
    "greater",
    "less",
    "greater_equal",
    "less_equal",
    "fmod",
    "bitwise_and",
    "bitwise_or",
    "rsub",
    "lerp",
    "polar",
]


@rule(*_PAIRWISE)
def _pairwise(call: Call) -> Any:
    if any(isinstance(a, Mask) for a in call.args[:2]) and call.name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        masks = [a for a in call.args[:2] if isinstance(a, Mask)]
        other = next((a for a in call.args[:2] if not isinstance(a, Mask)), None)
        if isinstance(other, Tensor):
            return build("add_mask" if call.name == "add" else "unknown", (other, masks[0]), other.shape, call.node)
        return masks[0]
    shape = broadcast(shape_of(call.args[0]), shape_of(call.args[1]) if len(call.args) > 1 else ())
    if call.name in ("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "greater", "less"):
        return build(call.name, tuple(call.args), shape, call.node, bool=True)
    return shape


@rule("where")
def _where(call: Call) -> Any:
    if len(call.args) == 1:
        size = Poly.symbol("<hits>")
        rank = len(call.shape or (ONE,))
        items = tuple(build("where_index", tuple(call.args), (size,), call.node, axis=i) for i in range(rank))
        return Sequence(op="tuple", args=items, items=items)
    return broadcast(broadcast(call.shape, shape_of(call.args[1])), shape_of(call.args[2]))


@rule("addcmul", "addcdiv")
def _three(call: Call) -> Any:
    return broadcast(broadcast(call.shape, shape_of(call.args[1])), shape_of(call.args[2]))


# -- rules: creation -------------------------------------------------------------------------------


def _sizes(values: list[Value]) -> list[Value]:
    if len(values) == 1 and isinstance(values[0], Sequence):
        return list(values[0].items)
    return values


def _dims(values: list[Value]) -> Shape | None:
    sizes = [v.size if isinstance(v, Scalar) else None for v in _sizes(values)]
    return None if any(s is None for s in sizes) else tuple(s for s in sizes if s is not None)


@rule("ones", "zeros", "empty", "rand", "randn")
def _filled(call: Call) -> Any:
    sizes = call.args or ([call.kwargs["size"]] if "size" in call.kwargs else [])
    return _dims(sizes)


@rule("new_zeros", "new_ones", "new_empty")
def _new_filled(call: Call) -> Any:
    return build(call.name.removeprefix("new_"), tuple(call.args[1:]), _dims(call.args[1:]), call.node)


@rule("full")
def _full(call: Call) -> Any:
    return _dims([call.args[0]])


@rule("new_full")
def _new_full(call: Call) -> Any:
    return build("full", tuple(call.args[1:]), _dims([call.args[1]]), call.node)


@rule("ones_like", "zeros_like", "empty_like", "full_like", "rand_like")
def _like(call: Call) -> Any:
    return build(call.name, tuple(call.args), call.shape, call.node, sizes_only=True)


@rule("arange")
def _arange(call: Call) -> Any:
    sizes = [a.size if isinstance(a, Scalar) else None for a in call.args[:3]]
    if any(s is None for s in sizes):
        return (Poly.symbol(f"arange({', '.join(scalars.text(a) for a in call.args)})"),)
    known = [s for s in sizes if s is not None]
    length = known[0] if len(known) == 1 else known[1] - known[0]
    if len(known) == 3:
        length = length.divide(known[2]) or length
    return (length,)


@rule("tensor", "as_tensor", "from_numpy", "array")
def _tensor(call: Call) -> Any:
    value = call.args[0]
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Sequence):
        return (Poly.const(len(value.items)),)
    return (Poly.symbol(f"len({scalars.text(value)})"),) if isinstance(value, Repeated) else ()


@rule("linspace")
def _linspace(call: Call) -> Any:
    return _dims([call.args[2]])


# -- rules: layout ---------------------------------------------------------------------------------


@rule("view", "reshape", "view_as", "reshape_as")
def _view(call: Call) -> Any:
    if call.name.endswith("_as"):
        return shape_of(call.args[1])
    targets = _sizes(call.args[1:]) if len(call.args) > 1 else _sizes(list(call.kwargs.values()))
    if len(targets) == 1 and isinstance(targets[0], Scalar) and targets[0].op == "dtype":
        return call.shape
    sizes = [v.size if isinstance(v, Scalar) else None for v in targets]
    if any(s is None for s in sizes):
        return None
    return resolve(call.shape, [s for s in sizes if s is not None])


def resolve(shape: Shape | None, sizes: list[Poly]) -> Shape | None:
    """Replace the -1 of a view by the size that is left."""
    hole = [i for i, s in enumerate(sizes) if s.number == -1]
    if not hole:
        return tuple(sizes)
    if shape is None:
        return None
    rest = product(s for s in sizes if s.number != -1)
    left = product(shape).divide(rest)
    sizes[hole[0]] = left if left is not None else Poly.symbol(f"({product(shape).text()}) // ({rest.text()})")
    return tuple(sizes)


@rule("transpose", "swapaxes", "swapdims")
def _transpose(call: Call) -> Any:
    shape = call.shape
    first, second = call.number(1, "dim0"), call.number(2, "dim1")
    if shape is None or first is None or second is None:
        return None
    order = list(range(len(shape)))
    a, b = first % len(order), second % len(order)
    order[a], order[b] = order[b], order[a]
    return build("permute", (call.args[0],), tuple(shape[i] for i in order), call.node, order=tuple(order))


@rule("permute")
def _permute(call: Call) -> Any:
    shape = call.shape
    order = [scalars.number(v) for v in _sizes(call.args[1:] or list(call.kwargs.values()))]
    if shape is None or any(o is None for o in order):
        return None
    axes = tuple(o % len(shape) for o in order if o is not None)
    return build("permute", (call.args[0],), tuple(shape[i] for i in axes), call.node, order=axes)


@rule("t")
def _t(call: Call) -> Any:
    return build("permute", (call.args[0],), call.shape[::-1] if call.shape else None, call.node, order=(1, 0))


@rule("unsqueeze")
def _unsqueeze(call: Call) -> Any:
    shape, number = call.shape, call.number(1, "dim")
    if shape is None or number is None:
        return None
    place = number % (len(shape) + 1)
    return build("unsqueeze", (call.args[0],), (*shape[:place], ONE, *shape[place:]), call.node, dim=place)


@rule("squeeze")
def _squeeze(call: Call) -> Any:
    shape = call.shape
    if shape is None:
        return None
    number = call.number(1, "dim")
    if number is None:
        return tuple(s for s in shape if s != ONE)
    place = number % len(shape)
    return (*shape[:place], *shape[place + 1 :]) if shape[place] == ONE else shape


@rule("flatten")
def _flatten(call: Call) -> Any:
    shape = call.shape
    first, last = call.number(1, "start_dim", 0), call.number(2, "end_dim", -1)
    if shape is None or first is None or last is None:
        return None
    a, b = first % len(shape), last % len(shape)
    return (*shape[:a], product(shape[a : b + 1]), *shape[b + 1 :])


@rule("unflatten")
def _unflatten(call: Call) -> Any:
    shape, number = call.shape, call.number(1, "dim")
    sizes = _dims([call.args[2]]) if len(call.args) > 2 else None
    if shape is None or number is None or sizes is None:
        return None
    place = number % len(shape)
    inner = resolve((shape[place],), list(sizes))
    return (*shape[:place], *inner, *shape[place + 1 :]) if inner is not None else None


@rule("expand", "broadcast_to", "expand_as")
def _expand(call: Call) -> Any:
    if call.name == "expand_as":
        return shape_of(call.args[1])
    shape = call.shape
    sizes = _dims(call.args[1:])
    if shape is None or sizes is None:
        return None
    padded = (ONE,) * (len(sizes) - len(shape)) + tuple(shape)
    return tuple(p if s.number == -1 else s for p, s in zip(padded, sizes, strict=True))


@rule("repeat", "tile")
def _repeat(call: Call) -> Any:
    shape, times = call.shape, _dims(call.args[1:])
    if shape is None or times is None:
        return None
    padded = (ONE,) * (len(times) - len(shape)) + tuple(shape)
    return tuple(p * t for p, t in zip(padded, times, strict=True))


@rule("repeat_interleave")
def _repeat_interleave(call: Call) -> Any:
    shape, number = call.shape, call.number(2, "dim")
    times = call.get(1, "repeats")
    if shape is None or not isinstance(times, Scalar) or times.size is None:
        return None
    if number is None:
        return (product(shape) * times.size,)
    place = number % len(shape)
    return (*shape[:place], shape[place] * times.size, *shape[place + 1 :])


# -- rules: splitting and joining ------------------------------------------------------------------


@rule("split", "split_with_sizes")
def _split(call: Call) -> Any:
    shape, number = call.shape, call.number(2, "dim", 0)
    sizes = call.get(1, "split_size_or_sections") or call.kwargs.get("split_size")
    if shape is None or number is None or sizes is None:
        return None
    place = number % len(shape)
    if isinstance(sizes, Sequence):
        parts = [v.size for v in sizes.items if isinstance(v, Scalar) and v.size is not None]
    elif isinstance(sizes, Scalar) and sizes.size is not None:
        count = shape[place].divide(sizes.size)
        times = count.number if count is not None else None
        if times is None or times.denominator != 1:
            piece = (*shape[:place], sizes.size, *shape[place + 1 :])
            return Repeated(op="split", item=build("piece", tuple(call.args), piece, call.node))
        parts = [sizes.size] * int(times)
    else:
        return None
    return _pieces(call, shape, place, parts)


@rule("chunk", "tensor_split")
def _chunk(call: Call) -> Any:
    shape, count, number = call.shape, call.number(1, "chunks"), call.number(2, "dim", 0)
    if shape is None or count is None or number is None:
        return None
    place = number % len(shape)
    size = shape[place].divide(Poly.const(count))
    return _pieces(call, shape, place, [size] * count) if size is not None else None


def _pieces(call: Call, shape: Shape, place: int, parts: list[Poly]) -> Sequence:
    items = []
    start = Poly.const(0)
    for size in parts:
        piece = (*shape[:place], size, *shape[place + 1 :])
        items.append(build("piece", (call.args[0],), piece, call.node, dim=place, start=start, size=size))
        start = start + size
    return Sequence(op="pieces", args=tuple(items), items=tuple(items), attrs={"dim": place})


@rule("unbind")
def _unbind(call: Call) -> Any:
    shape, number = call.shape, call.number(1, "dim", 0)
    if shape is None or number is None:
        return None
    place = number % len(shape)
    count = shape[place].number
    if count is None:
        return Repeated(
            op="unbind", item=build("row", (call.args[0],), (*shape[:place], *shape[place + 1 :]), call.node)
        )
    index = [Sequence(op="slice", items=(const(None),) * 3) for _ in range(place)]
    items = tuple(
        item(None, call.args[0], Sequence(op="index", items=(*index, const(i))), call.node or cst.Name("_"))
        for i in range(int(count))
    )
    return Sequence(op="tuple", args=items, items=items)


@rule("cat", "concat", "concatenate")
def _cat(call: Call) -> Any:
    parts = call.args[0]
    number = call.number(1, "dim", 0)
    if isinstance(parts, Repeated):
        return shape_of(parts.item)
    if not isinstance(parts, Sequence) or number is None:
        return None
    shapes = [shape_of(v) for v in parts.items]
    if not shapes or any(s is None for s in shapes):
        return None
    known = [s for s in shapes if s is not None]
    place = number % len(known[0]) if known[0] else 0
    if any(len(s) <= place for s in known):
        return None
    total = Poly.const(0)
    for s in known:
        total = total + s[place]
    return (*known[0][:place], total, *known[0][place + 1 :])


@rule("stack")
def _stack(call: Call) -> Any:
    parts, number = call.args[0], call.number(1, "dim", 0)
    if not isinstance(parts, Sequence) or number is None or not parts.items:
        return None
    shape = shape_of(parts.items[0])
    if shape is None:
        return None
    place = number % (len(shape) + 1)
    return (*shape[:place], Poly.const(len(parts.items)), *shape[place:])


# -- rules: products -------------------------------------------------------------------------------


@rule("matmul", "bmm")
def _matmul(call: Call) -> Any:
    left, right = call.shape, shape_of(call.args[1])
    if not left or not right:
        return None
    if len(right) == 1:
        return left[:-1]
    batch = broadcast(left[:-2], right[:-2])
    return (*batch, left[-2], right[-1]) if batch is not None and len(left) > 1 else None


@rule("baddbmm")
def _baddbmm(call: Call) -> Any:
    first, second = call.get(1, "batch1"), call.get(2, "batch2")
    left, right = shape_of(first or Value()), shape_of(second or Value())
    if not left or not right or first is None or second is None:
        return None
    extra = {k: call.kwargs[k] for k in ("alpha", "beta") if k in call.kwargs}
    shape = (*left[:-1], right[-1])
    return build("baddbmm", (call.args[0], first, second, *extra.values()), shape, call.node, kw=tuple(extra))


@rule("addmm")
def _addmm(call: Call) -> Any:
    left, right = shape_of(call.args[1]), shape_of(call.args[2])
    return (*left[:-1], right[-1]) if left and right else None


@rule("linear")
def _linear(call: Call) -> Any:
    left, right = call.shape, shape_of(call.args[1])
    return (*left[:-1], right[0]) if left and right else None


@rule("outer", "ger")
def _outer(call: Call) -> Any:
    left, right = call.shape, shape_of(call.args[1])
    return (*left, *right) if left is not None and right is not None else None


@rule("einsum")
def _einsum(call: Call) -> Any:
    pattern = call.args[0]
    operands = call.args[1:]
    if len(operands) == 1 and isinstance(operands[0], Sequence):
        operands = list(operands[0].items)
    if not isinstance(pattern, Scalar) or not isinstance(pattern.const, str) or "->" not in pattern.const:
        return None
    inputs, output = pattern.const.replace(" ", "").split("->")
    sizes: dict[str, Poly] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=False):
        shape = shape_of(operand)
        if shape is None or len(shape) != len(letters):
            return None
        sizes.update(zip(letters, shape, strict=True))
    return build("einsum", (pattern, *operands), tuple(sizes[x] for x in output), call.node)


# -- rules: reductions and lookups -----------------------------------------------------------------


@rule("mean", "sum", "prod", "amax", "amin", "var", "std", "norm", "all", "any", "argmax", "argmin", "logsumexp")
def _reduce(call: Call) -> Any:
    shape = call.shape
    dims = call.get(1, "dim", call.kwargs.get("axis"))
    keep = call.get(2, "keepdim")
    if shape is None:
        return None
    if dims is None or is_none(dims):
        return ()
    listed = dims.items if isinstance(dims, Sequence) else (dims,)
    axes = {axis(scalars.number(v), len(shape)) for v in listed}
    if keep is not None and scalars.known_truth(keep):
        return tuple(ONE if i in axes else s for i, s in enumerate(shape))
    return tuple(s for i, s in enumerate(shape) if i not in axes)


@rule("max", "min", "sort", "topk", "kthvalue")
def _picks(call: Call) -> Any:
    shape = call.shape
    if call.name in ("max", "min") and len(call.args) > 1 and isinstance(call.args[1], Tensor):
        return broadcast(shape, shape_of(call.args[1]))
    if call.name in ("max", "min") and len(call.args) == 1 and "dim" not in call.kwargs:
        return ()
    if shape is None:
        return None
    if call.name == "topk":
        count, number = call.get(1, "k"), call.number(2, "dim", -1)
        size = count.size if isinstance(count, Scalar) and count.size is not None else Poly.symbol("<k>")
        place = (number if number is not None else -1) % len(shape)
        out: Shape = (*shape[:place], size, *shape[place + 1 :])
    elif call.name == "sort":
        out = shape
    else:
        number = call.number(1, "dim", -1)
        place = (number if number is not None else -1) % len(shape)
        keep = call.get(2, "keepdim")
        one = (ONE,) if keep is not None and scalars.known_truth(keep) else ()
        out = (*shape[:place], *one, *shape[place + 1 :])
    every = (*call.args, *call.kwargs.values())
    values = build(call.name, every, out, call.node, kw=tuple(call.kwargs), part="values")
    indices = build(call.name, every, out, call.node, kw=tuple(call.kwargs), part="indices")
    return Sequence(op="record", args=(values, indices), items=(values, indices), names=("values", "indices"))


@rule("gather", "take_along_dim")
def _gather(call: Call) -> Any:
    return shape_of(call.get(2, "index") or Value())


@rule("index_select")
def _index_select(call: Call) -> Any:
    shape, number = call.shape, call.number(1, "dim")
    index = shape_of(call.get(2, "index") or Value())
    if shape is None or number is None or index is None:
        return None
    return (*shape[:number], *index, *shape[number + 1 :])


@rule("embedding")
def _embedding(call: Call) -> Any:
    ids, table = call.shape, shape_of(call.args[1])
    return (*ids, table[-1]) if ids is not None and table else None


@rule("one_hot")
def _one_hot(call: Call) -> Any:
    classes = call.get(1, "num_classes")
    size = classes.size if isinstance(classes, Scalar) and classes.size is not None else Poly.symbol("<classes>")
    return (*call.shape, size) if call.shape is not None else None


@rule("nonzero")
def _nonzero(call: Call) -> Any:
    return (Poly.symbol("<hits>"), Poly.const(len(call.shape or ())))


@rule("bincount")
def _bincount(call: Call) -> Any:
    return (Poly.symbol("<bins>"),)


@rule("item", "tolist")
def _item(call: Call) -> Any:
    if call.name == "tolist":
        return Repeated(op="tolist", args=(call.args[0],), item=Scalar(op="item", args=(call.args[0],), text="<item>"))
    return Scalar(op="item", args=(call.args[0],), text="<item>", size=None)


@rule("size")
def _size(call: Call) -> Any:
    base = call.args[0]
    assert isinstance(base, Tensor)
    whole = shape_value(base)
    position = call.get(1, "dim")
    if position is None or not isinstance(whole, Sequence):
        return whole
    return _sequence_item(whole, position)


@rule("dim")
def _dim(call: Call) -> Any:
    return const(len(call.shape)) if call.shape is not None else Scalar(op="rank", text="rank")


@rule("numel")
def _numel(call: Call) -> Any:
    size = product(call.shape) if call.shape is not None else None
    return Scalar(op="numel", args=(call.args[0],), text="numel", size=size)


@rule("pad")
def _pad(call: Call) -> Any:
    return None


@rule("get_device", "device")
def _device(call: Call) -> Any:
    return Scalar(op="device", text="<device>")


# Operations that leave an attention mask the mask that it was.
_MASK_KEEPS = frozenset(
    [
        "to",
        "type",
        "contiguous",
        "expand",
        "view",
        "reshape",
        "unsqueeze",
        "clone",
        "float",
        "bool",
        "half",
        "bfloat16",
        "detach",
    ]
)
_ALIASES = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "concat": "cat",
    "greater": "gt",
    "less": "lt",
    "masked_fill_": "masked_fill",
    "true_divide": "div",
    "sigmoid_": "sigmoid",
    "__getitem__": "getitem",
}


# -- layers ----------------------------------------------------------------------------------------


def layer_weight(base: Layer, name: str) -> Tensor:
    sizes = [base.params.get(k) for k in ("out_features", "in_features")]
    if base.kind == "embedding":
        sizes = [base.params.get(k) for k in ("num_embeddings", "embedding_dim")]
    if base.kind == "conv1d":
        sizes.reverse()
    known = tuple(s.size for s in sizes if isinstance(s, Scalar) and s.size is not None)
    return Tensor(op="layer_weight", args=(base,), shape=known[:1] if name == "bias" else known, attrs={"name": name})


def as_linear(result: Value, source: Value, shell: Layer) -> Value:
    """A subclass of nn.Linear that computes `x @ weight.T (+ bias)` itself is that linear."""
    inner = result.args[0] if result.op == "add" and result.args[1].op == "layer_weight" else result
    if (
        inner.op == "matmul"
        and inner.args[0] is source
        and inner.args[1].op == "permute"
        and isinstance(result, Tensor)
    ):
        weight = inner.args[1].args[0]
        if weight.op == "layer_weight" and weight.args[0] is shell:
            return build("linear", (source, shell), result.shape, result.node, layer=shell, sizes_only=False)
    return result


def layer(run: Interp, target: Layer, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    """Call a library layer."""
    values = [*args, *kwargs.values()]
    source = values[0] if values else Value()
    kind = target.kind
    if kind in ("dropout", "identity"):
        return source
    shape = shape_of(source)
    if kind in ("linear", "conv1d"):
        out = target.params.get("out_features")
        size = out.size if isinstance(out, Scalar) and out.size is not None else Poly.symbol("<out>")
        shape = (*shape[:-1], size) if shape else None
        return build("linear", (source, target), shape, node, layer=target, sizes_only=False)
    if kind == "embedding":
        dim = target.params.get("embedding_dim")
        size = dim.size if isinstance(dim, Scalar) and dim.size is not None else Poly.symbol("<dim>")
        shape = (*shape, size) if shape is not None else None
        return build("embedding", (source, target), shape, node, layer=target, sizes_only=False)
    if kind in ("layer_norm", "rms_norm", "activation"):
        return build(kind, (source, target), shape, node, layer=target)
    return _runtime_layer(run, target, args, kwargs, shape, node)


def _runtime_layer(
    run: Interp,
    target: Layer,
    args: list[Value],
    kwargs: dict[str, Value],
    shape: Shape | None,
    node: cst.CSTNode | None,
) -> Value:
    """The layers of porter.runtime, as a port calls them."""
    kind = target.kind
    if kind in ("merged_linear", "qkv_linear"):
        sizes = packed_sizes(target)
        total = Poly.const(0)
        for size in sizes:
            total = total + size
        out = (*shape[:-1], total) if shape else None
        return build("linear", (args[0], target), out, node, layer=target, sizes_only=False)
    if kind == "act_and_mul":
        half = shape[-1].divide(Poly.const(2)) if shape else None
        return build(kind, (args[0], target), (*shape[:-1], half) if shape and half is not None else None, node)
    if kind == "paged_attention":
        tensors = [a for a in args if isinstance(a, Tensor) and a.op != "positions"]
        query = tensors[0] if tensors else Tensor()
        heads, dim = (target.params.get(k) for k in ("num_heads", "head_dim"))
        width = (
            heads.size * dim.size
            if isinstance(heads, Scalar) and isinstance(dim, Scalar) and heads.size is not None and dim.size is not None
            else Poly.symbol("<attention>")
        )
        tokens = _token_dims(query.shape)
        return build("paged_attention", tuple(args), (*tokens, width), node, layer=target, sizes_only=False)
    if kind == "fused_moe":
        return build("fused_moe", tuple(args), shape, node, layer=target, sizes_only=False)
    tensors2 = tuple(a for a in [*args, *kwargs.values()] if isinstance(a, Tensor))
    return Tensor(op="unknown", args=tensors2, attrs={"why": f"layer {kind.removeprefix('unknown:')}"})


def _token_dims(shape: Shape | None) -> Shape:
    return tuple(s for s in shape or () if s.has_tokens and s.without_tokens() == ONE)


def packed_sizes(target: Layer) -> list[Poly]:
    """Output sizes of the shards of a merged or qkv linear."""
    if target.kind == "merged_linear":
        sizes = target.params.get("out_sizes")
        items = sizes.items if isinstance(sizes, Sequence) else ()
        return [v.size for v in items if isinstance(v, Scalar) and v.size is not None]
    heads, kv, dim = (target.params.get(k) for k in ("num_heads", "num_kv_heads", "head_dim"))
    kv = heads if kv is None or is_none(kv) else kv
    found = [v.size if isinstance(v, Scalar) and v.size is not None else ONE for v in (heads, kv, dim)]
    return [found[0] * found[2], found[1] * found[2], found[1] * found[2]]


def layer_method(
    run: Interp, base: Layer, name: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    if name == "split" and base.kind in ("qkv_linear", "merged_linear"):
        source = args[0]
        shape = shape_of(source)
        pieces = tuple(
            build("shard", (source,), (*shape[:-1], size) if shape else None, node, shard=i, layer=base)
            for i, size in enumerate(packed_sizes(base))
        )
        return Sequence(op="pieces", args=pieces, items=pieces)
    if name in ("append", "extend") and base.kind == "module_list":
        items = base.params.get("items")
        base.params["items"] = Repeated(op="repeat", item=args[0]) if items is None else items
    return const(None)


def attention(run: Interp, short: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    """The attention interface `(module, q, k, v, mask, **options)` or scaled_dot_product_attention(q, k, v, ...)."""
    names = ("query", "key", "value", "attention_mask")
    if short == "scaled_dot_product_attention":
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        given["attention_mask"] = given.pop("attn_mask", const(None))
        if "scale" in given:
            given["scaling"] = given.pop("scale")
    else:
        given = dict(zip(("module", *names), args, strict=False)) | kwargs
    query, value = given.get("query"), given.get("value")
    shape = shape_of(query) if query is not None else None
    out = (*shape[:-1], (shape_of(value) or shape)[-1]) if shape and value is not None else None
    core = Tensor(
        op="attention",
        args=tuple(v for v in given.values() if isinstance(v, Value)),
        shape=out,
        node=node,
        attrs={"given": given, "style": short},
    )
    if short == "scaled_dot_product_attention":
        return core
    back = Tensor(
        op="permute",
        args=(core,),
        node=node,
        attrs={"order": (0, 2, 1, 3)},
        shape=(out[0], out[2], out[1], out[3]) if out and len(out) == 4 else None,
    )
    return Sequence(op="tuple", args=(back,), items=(back, const(None)))
