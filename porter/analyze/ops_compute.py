"""Shapes of computing operations: elementwise functions, products, reductions and lookups."""

from __future__ import annotations

from typing import Any

from porter.analyze import scalars
from porter.analyze.indexing import sequence_item
from porter.analyze.poly import HITS, Poly, product
from porter.analyze.run import Infeasible
from porter.analyze.settled_sizes import clash
from porter.analyze.transfer import Call, axis, broadcast, build, rule, shape_of, shape_value
from porter.analyze.values import ONE, Mask, Repeated, Scalar, Sequence, Shape, Tensor, Value, const, is_none

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
        if "training" not in call.kwargs and len(call.args) < 3:
            return build("unknown", tuple(call.args), None, call.node, why="dropout without training= is always on")
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
    "bitwise_xor",
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
    if call.name in ("ne", "eq") and _asks_for_padding(call):
        filled = "ones" if call.name == "ne" else "zeros"
        return build(filled, (), call.shape, call.node, sizes_only=True, bool=True)
    left, right = shape_of(call.args[0]), shape_of(call.args[1]) if len(call.args) > 1 else ()
    run = call.run
    if run is not None and run.number_paths and clash(left, right, run.taken):  # half rewritten, sizes may clash
        raise Infeasible
    shape = broadcast(left, right)
    if call.name in ("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "greater", "less"):
        return build(call.name, tuple(call.args), shape, call.node, bool=True)
    return shape


def _asks_for_padding(call: Call) -> bool:
    """`input_ids != pad_token_id`: the engine pads nothing, and a sequence holds no padding token."""
    ids = call.args[0]
    while ids.op in ("view", "reshape"):
        ids = ids.args[0]
    return ids.op == "input_ids" and isinstance(call.args[1], Scalar) and "pad" in call.args[1].text


@rule("where")
def _where(call: Call) -> Any:
    if len(call.args) == 1:
        size = Poly.symbol(HITS)
        rank = len(call.shape or (ONE,))
        items = tuple(build("where_index", tuple(call.args), (size,), call.node, axis=i) for i in range(rank))
        return Sequence(op="tuple", args=items, items=items)
    return broadcast(broadcast(call.shape, shape_of(call.args[1])), shape_of(call.args[2]))


@rule("addcmul", "addcdiv")
def _three(call: Call) -> Any:
    return broadcast(broadcast(call.shape, shape_of(call.args[1])), shape_of(call.args[2]))


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
    return (Poly.symbol(HITS), Poly.const(len(call.shape or ())))


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
    return sequence_item(whole, position)


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
