"""Run the transfer function of a torch operation, a tensor method or a tensor attribute."""

from __future__ import annotations

import libcst as cst

from porter.analyze import ops_compute, ops_create, ops_einops, ops_layout, scalars  # noqa: F401  (registers their rules)
from porter.analyze.run import Run
from porter.analyze.transfer import RULES, Call, build, shape_value
from porter.analyze.values import Mask, Scalar, Tensor, Value, const


def apply(run: Run | None, name: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
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
    run: Run, base: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    return apply(run, name, [base, *args], kwargs, node)


def torch_call(
    run: Run, full: str, short: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
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
        "is_initialized",
        "is_autocast_enabled",
    ):
        return const(False)
    if full.startswith("torch.distributed.") and short in ("get_world_size", "get_rank"):
        return const(1 if short == "get_world_size" else 0)  # one process runs the original
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
