"""What the symbolic execution knows of torch.nn, transformers and Python: layers, masks, outputs, serving facts."""

from __future__ import annotations

import math
from typing import TypeGuard

import libcst as cst

from porter.analyze import ops, ops_layers, scalars
from porter.analyze.builtins import builtin
from porter.analyze.library_layers import ACTIVATION_NAMES, ACTIVATIONS, LAYERS, construct, init_base, layer_attribute
from porter.analyze.poly import Poly
from porter.analyze.program import PRESENT, ClassInfo
from porter.analyze.run import Run
from porter.analyze.serving import SERVING
from porter.analyze.values import (
    ONE,
    B,
    ClassRef,
    Config,
    External,
    Function,
    Instance,
    Layer,
    Mask,
    S,
    Scalar,
    Sequence,
    Tensor,
    Value,
    const,
    is_none,
    symbol,
)

_MASKS = {
    "create_causal_mask": "causal",
    "create_sliding_window_causal_mask": "sliding",
    "create_chunked_causal_mask": "chunked",
    "create_bidirectional_mask": "bidirectional",
    "create_recurrent_attention_mask": "padding",
    "_prepare_4d_causal_attention_mask": "causal",
    "_prepare_4d_causal_attention_mask_for_sdpa": "causal",
    "_prepare_4d_causal_attention_mask_with_cache_position": "causal",
}


def config_field(run: Run, base: Config, name: str, node: cst.CSTNode | None) -> Value:
    """A field of the config: fixed by serving, or open under its source text."""
    name = run.program.config_aliases.get(name, name)
    path = f"{base.path}.{name}"
    if name in base.attrs:
        found: Value = base.attrs[name]
        return found
    if name in SERVING:
        run.world.assumed[name] = SERVING[name][0]
        return const(SERVING[name][0])
    if node is not None:
        run.world.config_reads.setdefault(name, node)
    computed = _config_property(run, base, name)
    if computed is not None:
        return computed
    if name in ("get_text_config", "to_dict"):
        return Value(op="attribute", args=(base,), attrs={"name": name})
    if name.endswith("_config") or name in ("text_config", "decoder"):
        return Config(op="config", path=path)
    return symbol(path)


def _config_property(run: Run, base: Config, name: str) -> Value | None:
    """A property of the config class, read from its own file: `rotary` is `not self.alibi`."""
    info = run.program.config_class
    method = info.methods.get(name) if info is not None else None
    if method is None or not any(d.endswith("property") for d in method.decorators):
        return None
    return run.call(Function(info=method, bound=base), [], {}, None)


def external_attribute(base: External, name: str) -> Value:
    full = f"{base.name}.{name}"
    if base.name == "torch" and name in (
        "float32",
        "float",
        "float16",
        "half",
        "bfloat16",
        "int64",
        "long",
        "int32",
        "int",
        "bool",
        "double",
        "float64",
        "uint8",
        "int8",
        "int16",
    ):
        return Scalar(op="dtype", text=full, attrs={"dtype": name})
    if full in ("math.pi", "math.inf", "torch.pi"):
        return const(getattr(math, name))
    return External(op="external", name=full, args=base.args)


def sequence_attribute(base: Sequence, name: str) -> Value:
    if name in base.names:
        return base.items[base.names.index(name)]
    if base.names and name not in ("to_tuple", "get", "items", "keys"):
        return const(None)
    return Value(op="attribute", args=(base,), attrs={"name": name})


def inherited_attribute(run: Run, base: Instance, name: str) -> Value:
    """An attribute that the file does not define: of nn.Module, PreTrainedModel, nn.Embedding ..."""
    if name == "config":
        return Config(op="config")
    if name in ("device", "dtype"):
        return Scalar(op="dtype" if name == "dtype" else "device", text=f"self.{name}", attrs={"dtype": "same"})
    shell = base.attrs.get("<layer>")
    if isinstance(shell, Layer):
        return layer_attribute(run, shell, name, None)
    return Value(op="attribute", args=(base,), attrs={"name": name})


def external_item(run: Run, base: External, index: Value) -> Value:
    """`ACT2FN[...]`, `ALL_ATTENTION_FUNCTIONS[...]`, type subscripts."""
    short = base.name.rsplit(".", 1)[-1]
    if short in ("ACT2FN", "ACT2CLS"):
        made = Layer(op="layer", kind="activation", params={"name": index})
        return made if short == "ACT2FN" else External(op="external", name="activation_class", args=(made,))
    if short == "ROPE_INIT_FUNCTIONS":
        return External(op="external", name="rope_init")
    if short == "ALL_ATTENTION_FUNCTIONS":
        return External(op="external", name="attention_interface")
    return External(op="external", name=f"{base.name}[{scalars.text(index)}]")


def build_record(run: Run, info: ClassInfo, args: list[Value], kwargs: dict[str, Value]) -> Value | None:
    """Instances of output dataclasses become named sequences; autograd functions are called by `.apply`."""
    bases = [b.rsplit(".", 1)[-1] for b in run.program.external_bases(info)]
    if any(b.endswith("Output") or "OutputWith" in b for b in bases):
        names = [n for c in reversed(run.program.mro(info)) for n in _fields(c)]
        return _record(names, args, kwargs)
    return None


def _fields(info: ClassInfo) -> list[str]:
    body = info.node.body.body if isinstance(info.node.body, cst.IndentedBlock) else ()
    return [
        small.target.value
        for line in body
        if isinstance(line, cst.SimpleStatementLine)
        for small in line.body
        if isinstance(small, cst.AnnAssign) and isinstance(small.target, cst.Name)
    ]


def _record(names: list[str], args: list[Value], kwargs: dict[str, Value]) -> Sequence:
    items = dict(zip(names, args, strict=False)) | kwargs
    kept = {k: v for k, v in items.items() if not is_none(v)}
    return Sequence(op="record", args=tuple(kept.values()), items=tuple(kept.values()), names=tuple(kept))


def call_layer(run: Run, layer: Layer, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    if layer.kind == "sequential":
        value = args[0]
        items = layer.params["items"]
        for item in items.items if isinstance(items, Sequence) else ():
            value = run.call(item, [value], {}, node)
        return value
    return ops_layers.layer(run, layer, args, kwargs, node)


def call_subclass(
    run: Run, target: Instance, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    """A class without forward of its own: an nn.Linear or nn.Embedding subclass."""
    shell = target.attrs.get("<layer>")
    if isinstance(shell, Layer):
        shell.path = target.path
        return call_layer(run, shell, args, kwargs, node)
    return Tensor(op="unknown", args=tuple(args), attrs={"why": "the called class has no forward"})


def call_external(
    run: Run, function: External, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    name = function.name
    short = name.rsplit(".", 1)[-1]
    if name.startswith("super."):
        return _call_super(run, function, short, args, kwargs, node)
    if name.startswith("builtins."):
        return builtin(run, short, args, kwargs, node)
    if name == "attention_interface" or short == "scaled_dot_product_attention":
        return ops_layers.attention(run, short, args, kwargs, node)
    if name == "activation_class":
        return function.args[0]
    if name.startswith("transformers.activations.") and short.islower() and short != "get_activation":
        named = const(ACTIVATION_NAMES.get(short, short))
        return run.call(Layer(op="layer", kind="activation", params={"name": named}), args, kwargs, node)
    if short == "rope_init":
        return _rope_init(run, name, args, kwargs)
    if short in _MASKS:
        return _mask(short, args, kwargs)
    if name.startswith("math."):
        return scalars.call(f"math.{short}", scalars.MATH.get(short), args)
    if "logger" in name or name.startswith(("logging", "warnings", "transformers.utils.logging")):
        return const(None)
    if short in ("get_interface",):
        return External(op="external", name="attention_interface")
    if short == "apply" and function.args and isinstance(function.args[0], ClassRef):
        return (
            run.call(Function(info=function.args[0].info.methods["forward"]), [Value(op="ctx"), *args], kwargs, node)
            if function.args[0].info is not None and "forward" in function.args[0].info.methods
            else Value()
        )
    if name.startswith(("torch.nn.", "nn.", "porter.runtime", "transformers.pytorch_utils", "torch.nn")):
        made = construct(run, short, args, kwargs)
        if made is not None:
            return made
    if short in ACTIVATIONS and "functional" not in name:
        return Layer(op="layer", kind="activation", params={"name": const(ACTIVATIONS[short])})
    if short in LAYERS and short[0].isupper():
        made = construct(run, short, args, kwargs)
        if made is not None:
            return made
    if short.endswith("Output") or "OutputWith" in short:
        return _record([f"item{i}" for i in range(len(args))], args, kwargs)
    return _helpers(run, name, short, args, kwargs, node)


def _helpers(
    run: Run, name: str, short: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    if short == "apply_chunking_to_forward":
        return run.call(args[0], args[3:], {}, node)
    if short in ("partial",):
        return args[0]
    if name in ("copy.deepcopy", "copy.copy") and args:
        return Config(op="config", path=args[0].path, attrs=dict(args[0].attrs)) if _is_config(args[0]) else args[0]
    if short in ("finfo", "iinfo"):
        return symbol(f"{short}", op="finfo")
    if short == "get_act_fn" or short == "get_activation":
        return Layer(op="layer", kind="activation", params={"name": args[0]})
    if short == "get_act_and_mul":
        return Layer(op="layer", kind="act_and_mul", params={"name": args[0]})
    if short in ("get_rope_parameters", "get_alibi_slopes"):
        return symbol(f"{short}({', '.join(scalars.text(a) for a in args)})")
    if short.startswith(("is_torch", "is_flash", "is_tracing", "is_kernels", "is_causal_conv", "is_mamba")):
        return const(False)
    if short in ("get_tensor_model_parallel_world_size",):
        return const(1)
    if name in ("importlib.util.find_spec", "importlib.find_loader"):
        package = scalars.text(args[0]).strip("'\"").split(".")[0] if args else ""
        return External(op="external", name=package) if package in PRESENT else const(None)  # optional ones are absent
    if short == "skip_init" and args:
        return run.call(args[0], args[1:], kwargs, node)
    if name.startswith(("torch", "nn.", "F.", "numpy", "np.")):
        return ops.torch_call(run, name, short, args, kwargs, node)
    if name in ("einops.rearrange", "einops.repeat") and len(args) == 2:
        return ops.apply(run, short if short == "rearrange" else "unknown", args, kwargs, node)
    if short in ("torch_compilable_check", "warn_once", "deprecate_kwarg"):
        return const(None)
    tensors = tuple(a for a in [*args, *kwargs.values()] if isinstance(a, Tensor))
    why = {"why": f"{name} is not known"}
    if tensors:
        return Tensor(op="unknown", args=tensors, attrs=why)
    if short[:1].isupper():
        return Layer(op="layer", kind=f"unknown:{name}", params=kwargs)
    return Value(op="unknown", args=tuple(args), attrs=why)


def _is_config(value: Value) -> TypeGuard[Config]:
    return isinstance(value, Config)


def _rope_init(run: Run, name: str, args: list[Value], kwargs: dict[str, Value]) -> Sequence:
    """(inverse frequencies, attention scaling) of transformers' RoPE functions or the runtime's, default type."""
    config = kwargs.get("config", args[0] if args else None)
    path = config.path if isinstance(config, Config) else "config"
    dim: Value = symbol(f"(getattr({path}, 'head_dim', None) or {path}.hidden_size // {path}.num_attention_heads)")
    if name.startswith("porter."):
        dim = args[1]
    half = scalars.binary("floor_divide", dim, const(2))
    size = half.size if isinstance(half, Scalar) else None
    table = Tensor(
        op="rope_init",
        args=(symbol(f"{path}.rope_theta"), dim),
        shape=(size or Poly.symbol("<rotary>"),),
        attrs={"sizes_only": True},
    )
    return Sequence(op="tuple", args=(table,), items=(table, const(1.0)))


def _mask(short: str, args: list[Value], kwargs: dict[str, Value]) -> Mask:
    kind = _MASKS[short]
    window = kwargs.get("sliding_window", args[5] if short.startswith("_prepare") and len(args) > 5 else None)
    if kind == "sliding":
        config = kwargs.get("config", args[0] if args else None)
        path = config.path if isinstance(config, Config) else "config"
        window = symbol(f"{path}.sliding_window")
    if window is not None and is_none(window):
        window = None
    if window is not None and kind == "causal":
        kind = "sliding"
    extra = [
        k
        for k in ("or_mask_function", "and_mask_function", "block_sequence_ids")
        if k in kwargs and not is_none(kwargs[k])
    ]
    return Mask(
        op="mask",
        kind=kind if not extra else f"causal with {extra[0]}",
        window=window,
        shape=(B, ONE, S, S),
        attrs={"sizes_only": True},
    )


def _call_super(
    run: Run, function: External, short: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    """A method of a base outside the file."""
    instance = function.args[0] if function.args else None
    if not isinstance(instance, Instance):
        return const(None)
    if short == "__init__":
        init_base(run, instance, args, kwargs)
        return const(None)
    if short in ("forward", "__call__"):
        return call_subclass(run, instance, args, kwargs, node)
    return const(None)
