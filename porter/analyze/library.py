"""What the symbolic execution knows of torch.nn, transformers and Python: layers, masks, outputs, serving facts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import libcst as cst

from porter.analyze import ops, ops_layers, scalars
from porter.analyze.poly import Poly
from porter.analyze.program import ClassInfo
from porter.analyze.values import (
    ONE,
    B,
    ClassRef,
    Config,
    External,
    Function,
    Instance,
    Layer,
    Mapping,
    Mask,
    Repeated,
    S,
    Scalar,
    Sequence,
    Super,
    Tensor,
    Value,
    const,
    is_none,
    symbol,
)

if TYPE_CHECKING:
    from porter.analyze.interp import Interp

# Config fields that serving fixes, with the reason; a port is for these values only.
SERVING: dict[str, tuple[Any, str]] = {
    "use_cache": (False, "the paged cache replaces the model's own"),
    "output_attentions": (False, "serving returns no attention maps"),
    "output_hidden_states": (False, "serving returns no inner states"),
    "output_router_logits": (False, "router logits serve the training loss"),
    "return_dict": (True, "the container of the outputs does not change them"),
    "use_return_dict": (True, "the container of the outputs does not change them"),
    "_attn_implementation": ("eager", "the eager path is the reference of all attention implementations"),
    "_flash_attn_2_enabled": (False, "the eager path is the reference of all attention implementations"),
    "add_cross_attention": (False, "a causal language model has no encoder"),
    "is_encoder_decoder": (False, "a causal language model has no encoder"),
    "is_decoder": (True, "a causal language model attends to the past only"),
    "cross_attention_hidden_size": (None, "a causal language model has no encoder"),
    "pretraining_tp": (1, "it only splits the same sums into slices"),
    "slow_but_exact": (False, "it only splits the same sums into slices"),
    "gradient_checkpointing": (False, "training only"),
    "torchscript": (False, "tracing only"),
    "reorder_and_upcast_attn": (False, "the same attention in another order of operations"),
    "use_bidirectional_attention": (False, "serving is causal"),
    "chunk_size_feed_forward": (0, "chunking the MLP does not change it"),
    "dtype": (None, "the engine chooses the dtype"),
    "torch_dtype": (None, "the engine chooses the dtype"),
}
_LAYERS = {
    "Linear": ("linear", ("in_features", "out_features", "bias", "device", "dtype")),
    "Conv1D": ("conv1d", ("out_features", "in_features")),
    "Embedding": ("embedding", ("num_embeddings", "embedding_dim", "padding_idx")),
    "LayerNorm": ("layer_norm", ("normalized_shape", "eps", "elementwise_affine", "bias")),
    "RMSNorm": ("rms_norm", ("normalized_shape", "eps", "elementwise_affine")),
    "Dropout": ("dropout", ("p", "inplace")),
    "Identity": ("identity", ()),
    "ModuleList": ("module_list", ("items",)),
    "Sequential": ("sequential", ("items",)),
    "ModuleDict": ("module_dict", ("items",)),
}
_ACTIVATIONS = {
    "GELU": "gelu",
    "SiLU": "silu",
    "ReLU": "relu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "Softplus": "softplus",
}
# The layers of porter.runtime, so that a port can be analysed as well as its source.
_RUNTIME = {
    "ColumnParallelLinear": ("linear", ("in_features", "out_features", "bias")),
    "RowParallelLinear": ("linear", ("in_features", "out_features", "bias")),
    "ReplicatedLinear": ("linear", ("in_features", "out_features", "bias")),
    "ParallelLMHead": ("linear", ("out_features", "in_features", "bias")),
    "VocabParallelEmbedding": ("embedding", ("num_embeddings", "embedding_dim")),
    "MergedColumnParallelLinear": ("merged_linear", ("in_features", "out_sizes", "bias")),
    "QKVParallelLinear": ("qkv_linear", ("in_features", "head_dim", "num_heads", "num_kv_heads", "bias")),
    "PagedAttention": ("paged_attention", ("num_heads", "head_dim", "scaling")),
    "PagedAttentionWithRoPE": ("paged_attention", ("num_heads", "head_dim", "scaling")),
    "PagedAttentionWithALiBi": ("paged_attention", ("num_heads", "head_dim", "scaling")),
    "FusedMoE": ("fused_moe", ("num_experts", "hidden_size", "intermediate_size", "hidden_act")),
    "RotaryEmbedding": ("rotary", ("rope_parameters", "head_dim", "max_position")),
    "Sampler": ("sampler", ()),
}
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


# -- attributes ------------------------------------------------------------------------------------


def config_field(run: Interp, base: Config, name: str, node: cst.CSTNode | None) -> Value:
    """A field of the config: fixed by serving, or open under its source text."""
    name = run.program.config_aliases.get(name, name)
    path = f"{base.path}.{name}"
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


def _config_property(run: Interp, base: Config, name: str) -> Value | None:
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


def layer_attribute(base: Layer, name: str, node: cst.CSTNode | None) -> Value:
    if name in base.attrs and isinstance(base.attrs[name], Value):
        found: Value = base.attrs[name]
        return found
    if base.kind == "qkv_linear" and name in ("num_heads", "num_kv_heads"):
        total = base.params.get(name)
        total = base.params["num_heads"] if total is None or is_none(total) else total
        return Scalar(op="leaf", text=f"local.{name}", size=total.size if isinstance(total, Scalar) else None)
    if name in base.params and name != "bias":
        return base.params[name]
    if name == "bias" and _is_false(base.params.get("bias")):
        return const(None)
    if name in ("weight", "bias") and base.kind in ("linear", "conv1d", "embedding", "layer_norm", "rms_norm"):
        return ops_layers.layer_weight(base, name)
    return Value(op="attribute", args=(base,), attrs={"name": name})


def _is_false(value: Value | None) -> bool:
    return isinstance(value, Scalar) and value.known and value.const is False


def inherited_attribute(run: Interp, base: Instance, name: str) -> Value:
    """An attribute that the file does not define: of nn.Module, PreTrainedModel, nn.Embedding ..."""
    if name == "config":
        return Config(op="config")
    if name in ("device", "dtype"):
        return Scalar(op="dtype" if name == "dtype" else "device", text=f"self.{name}", attrs={"dtype": "same"})
    shell = base.attrs.get("<layer>")
    if isinstance(shell, Layer):
        return layer_attribute(shell, name, None)
    return Value(op="attribute", args=(base,), attrs={"name": name})


def external_item(run: Interp, base: External, index: Value) -> Value:
    """`ACT2FN[...]`, `ALL_ATTENTION_FUNCTIONS[...]`, type subscripts."""
    short = base.name.rsplit(".", 1)[-1]
    if short in ("ACT2FN", "ACT2CLS"):
        return Layer(op="layer", kind="activation", params={"name": index})
    if short == "ROPE_INIT_FUNCTIONS":
        return External(op="external", name="rope_init")
    if short == "ALL_ATTENTION_FUNCTIONS":
        return External(op="external", name="attention_interface")
    return External(op="external", name=f"{base.name}[{scalars.text(index)}]")


# -- building --------------------------------------------------------------------------------------


def make_layer(name: str, args: list[Value], kwargs: dict[str, Value]) -> Layer | None:
    """A layer of torch.nn or of the runtime by class name."""
    kind, names = _LAYERS.get(name) or _RUNTIME.get(name) or ("", ())
    if not kind:
        return None
    params = dict(zip(names, args, strict=False)) | kwargs
    if kind == "linear" and "bias" not in params:
        params["bias"] = const(name != "ParallelLMHead")
    if kind == "sequential":
        params["items"] = Sequence(op="tuple", args=tuple(args), items=tuple(args))
    return Layer(op="layer", kind=kind, params=params, attrs={"class": name})


def init_base(run: Interp, instance: Instance, args: list[Value], kwargs: dict[str, Value]) -> None:
    """`super().__init__(...)` of a class that inherits from a library layer keeps that layer's sizes."""
    assert instance.cls is not None
    for base in run.program.external_bases(instance.cls):
        layer = make_layer(base.rsplit(".", 1)[-1], args, kwargs)
        if layer is not None:
            instance.attrs["<layer>"] = layer


def build_record(run: Interp, info: ClassInfo, args: list[Value], kwargs: dict[str, Value]) -> Value | None:
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


# -- calling ---------------------------------------------------------------------------------------


def call_layer(
    run: Interp, layer: Layer, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    if layer.kind == "sequential":
        value = args[0]
        items = layer.params["items"]
        for item in items.items if isinstance(items, Sequence) else ():
            value = run.call(item, [value], {}, node)
        return value
    return ops_layers.layer(run, layer, args, kwargs, node)


def call_subclass(
    run: Interp, target: Instance, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    """A class without forward of its own: an nn.Linear or nn.Embedding subclass."""
    shell = target.attrs.get("<layer>")
    if isinstance(shell, Layer):
        shell.path = target.path
        return call_layer(run, shell, args, kwargs, node)
    return Tensor(op="unknown", args=tuple(args), attrs={"why": "the called class has no forward"})


def call_external(
    run: Interp, function: External, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    name = function.name
    short = name.rsplit(".", 1)[-1]
    if name.startswith("super."):
        return _call_super(run, function, short, args, kwargs, node)
    if name.startswith("builtins."):
        return _builtin(run, short, args, kwargs, node)
    if name == "attention_interface" or short == "scaled_dot_product_attention":
        return ops_layers.attention(run, short, args, kwargs, node)
    if name == "rope_init":
        return _rope_init(args, kwargs)
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
        made = _construct(run, short, args, kwargs)
        if made is not None:
            return made
    if short in _ACTIVATIONS and "functional" not in name:
        return Layer(op="layer", kind="activation", params={"name": const(_ACTIVATIONS[short])})
    if short in _LAYERS and short[0].isupper():
        made = _construct(run, short, args, kwargs)
        if made is not None:
            return made
    if short.endswith("Output") or "OutputWith" in short:
        return _record([f"item{i}" for i in range(len(args))], args, kwargs)
    return _helpers(run, name, short, args, kwargs, node)


def _construct(run: Interp, short: str, args: list[Value], kwargs: dict[str, Value]) -> Value | None:
    if short in ("Parameter", "Buffer"):
        inner = args[0] if args else Value()
        shape = inner.shape if isinstance(inner, Tensor) else None
        if short == "Parameter":
            return Tensor(op="parameter", args=tuple(args[:1]), shape=shape)
        return inner
    layer = make_layer(short, args, kwargs)
    if layer is not None:
        run.world.created.append(layer)
    if layer is None and short in _ACTIVATIONS:
        return Layer(op="layer", kind="activation", params={"name": const(_ACTIVATIONS[short]), **kwargs})
    return layer


def _helpers(
    run: Interp, name: str, short: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    if short == "apply_chunking_to_forward":
        return run.call(args[0], args[3:], {}, node)
    if short in ("partial",):
        return args[0]
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
    if name.startswith(("torch", "nn.", "F.", "numpy", "np.")):
        return ops.torch_call(run, name, short, args, kwargs, node)
    if short in ("torch_compilable_check", "warn_once", "deprecate_kwarg"):
        return const(None)
    tensors = tuple(a for a in [*args, *kwargs.values()] if isinstance(a, Tensor))
    why = {"why": f"{name} is not known"}
    if tensors:
        return Tensor(op="unknown", args=tensors, attrs=why)
    if short[:1].isupper():
        return Layer(op="layer", kind=f"unknown:{name}", params=kwargs)
    return Value(op="unknown", args=tuple(args), attrs=why)


def _rope_init(args: list[Value], kwargs: dict[str, Value]) -> Sequence:
    """(inverse frequencies, attention scaling) of transformers' rope functions, analysed for the default type."""
    config = kwargs.get("config", args[0] if args else None)
    path = config.path if isinstance(config, Config) else "config"
    theta = symbol(f"{path}.rope_theta")
    size = Poly.symbol(f"getattr({path}, 'head_dim', {path}.hidden_size // {path}.num_attention_heads) // 2")
    table = Tensor(op="rope_init", args=(theta,), shape=(size,), attrs={"sizes_only": True})
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
    run: Interp, function: External, short: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
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


def call_method(
    run: Interp, base: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    """A method of a mapping, a list, a layer, a library object, or one that the file does not define."""
    if isinstance(base, Mapping):
        return _mapping_method(base, name, args)
    if isinstance(base, Sequence | Repeated):
        return _list_method(base, name, args)
    plain = all(isinstance(a, Scalar) and a.known for a in args)
    if plain and isinstance(base, Scalar) and isinstance(base.const, str) and hasattr(base.const, name):
        return const(getattr(base.const, name)(*[a.const for a in args if isinstance(a, Scalar)]))
    if isinstance(base, Config):
        return Config(op="config", path=base.path) if name == "get_text_config" else symbol(f"{base.path}.{name}()")
    if isinstance(base, Layer):
        return ops_layers.layer_method(run, base, name, args, kwargs, node)
    if isinstance(base, Instance):
        if name == "register_buffer" and len(args) > 1 and isinstance(args[0], Scalar):
            base.attrs[args[0].const] = args[1]
            return const(None)
        if name == "register_parameter" and len(args) > 1 and isinstance(args[0], Scalar):
            base.attrs[args[0].const] = args[1]
            return const(None)
        if name == "get_head_mask":
            return Repeated(op="repeat", item=const(None))
        if name == "add_module" and isinstance(args[0], Scalar):
            base.attrs[args[0].const] = args[1]
    return const(None)


def _mapping_method(base: Mapping, name: str, args: list[Value]) -> Value:
    key = args[0].const if args and isinstance(args[0], Scalar) and args[0].known else None
    default = args[1] if len(args) > 1 else const(None)
    if name == "get":
        return base.items.get(key, default)
    if name == "pop":
        return base.items.pop(key, default)
    if name == "items":
        pairs = [Sequence(op="tuple", items=(const(k), v), args=(v,)) for k, v in base.items.items()]
        return Sequence(op="tuple", items=tuple(pairs))
    if name == "keys":
        return Sequence(op="tuple", items=tuple(const(k) for k in base.items))
    if name == "values":
        return Sequence(op="tuple", items=tuple(base.items.values()))
    if name == "update" and args and isinstance(args[0], Mapping):
        base.items.update(args[0].items)
    return const(None)


def _list_method(base: Sequence | Repeated, name: str, args: list[Value]) -> Value:
    if name == "append" and isinstance(base, Sequence):
        base.items = (*base.items, args[0])
    elif name == "numel" and isinstance(base, Sequence):
        return Scalar(op="numel", text="numel", size=Poly.const(1))
    return const(None)


def _builtin(run: Interp, name: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    handler = _BUILTINS.get(name)
    if handler is not None:
        found: Value = handler(run, args, kwargs, node)
        return found
    if name in ("min", "max") and not any(isinstance(a, Tensor) for a in args):
        return scalars.extreme(name, args)
    if name in scalars.BUILTIN:
        if args and isinstance(args[0], Tensor):
            return ops.method(run, args[0], "item", [], {}, node)
        return scalars.call(name, scalars.BUILTIN[name], args)
    return const(None) if name == "print" else Value(op="unknown", args=tuple(args), attrs={"why": name})


def _isinstance(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    value, kinds = args[0], args[1]
    names = [scalars.text(k).rsplit(".", 1)[-1] for k in (kinds.items if isinstance(kinds, Sequence) else [kinds])]
    if isinstance(kinds, ClassRef) and kinds.info is not None:
        names = [kinds.info.name]
    if isinstance(value, Scalar) and value.known:
        return const(type(value.const).__name__ in names)
    if isinstance(value, Scalar):
        return symbol(f"isinstance({value.text}, {scalars.text(kinds)})")
    if isinstance(value, Instance) and value.cls is not None:
        return const(any(c.name in names for c in run.program.mro(value.cls)))
    kind = {
        Tensor: "Tensor",
        Sequence: "list" if getattr(value, "mutable", False) else "tuple",
        Mapping: "dict",
        Mask: "Tensor",
    }.get(type(value), "")
    return const(kind in names or (kind == "Tensor" and any(n.endswith("Tensor") for n in names)))


def _getattr(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    base, name = args[0], args[1]
    if not isinstance(name, Scalar) or not name.known:
        return Value(op="unknown", attrs={"why": "getattr with an open name"})
    if isinstance(base, Config) and name.const not in SERVING:
        if len(args) > 2:
            run.world.config_reads.setdefault(f"{name.const}?", node or cst.Name("_"))
            source = f"getattr({base.path}, {name.const!r}, {scalars.text(args[2])})"
            return Scalar(op="getattr", args=(args[2],), text=source, size=Poly.symbol(source))
        return run.attribute(base, name.const, node)
    absent = isinstance(base, Instance) and name.const not in base.attrs and base.cls is not None
    if absent and len(args) > 2 and run.program.method(base.cls, name.const) is None:  # type: ignore[attr-defined]
        return args[2]
    return run.attribute(base, name.const, node)


def _hasattr(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    base, name = args[0], args[1]
    if isinstance(base, Instance) and isinstance(name, Scalar) and base.cls is not None:
        known = name.const in base.attrs or run.program.method(base.cls, name.const) is not None
        return const(known)
    if isinstance(base, Sequence) and isinstance(name, Scalar):
        return const(name.const in base.names)
    return symbol(f"hasattr({scalars.text(base)}, {scalars.text(name)})")


def _len(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    value = args[0]
    if isinstance(value, Sequence | Mapping):
        return const(len(value.items))
    if isinstance(value, Tensor) and value.shape:
        return Scalar(op="len", args=(value,), text="len", size=value.shape[0])
    return symbol(f"len({scalars.text(value)})")


def _range(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    numbers = [scalars.number(a) for a in args]
    if all(n is not None for n in numbers):
        span = range(*[n for n in numbers if n is not None])
        if len(span) <= 8:
            return Sequence(op="tuple", items=tuple(const(i) for i in span))
    return Repeated(op="range", args=tuple(args), item=symbol("layer_idx", op="index"))


def _enumerate(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    return _zip(run, [Repeated(op="range", item=symbol("layer_idx", op="index")), *args[:1]], kwargs, node)


def _zip(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    fixed = [a for a in args if isinstance(a, Sequence)]
    if fixed and all(isinstance(a, Sequence) for a in args):
        return Sequence(
            op="tuple",
            items=tuple(
                Sequence(op="tuple", items=pair, args=pair) for pair in zip(*[a.items for a in fixed], strict=False)
            ),
        )
    if fixed and len(args) == 2 and isinstance(args[0], Repeated) and args[0].op == "range":
        return Sequence(
            op="tuple",
            items=tuple(Sequence(op="tuple", items=(const(i), v), args=(v,)) for i, v in enumerate(fixed[0].items)),
        )
    lists = [a.params["items"] if isinstance(a, Layer) and "items" in a.params else a for a in args]
    items = tuple(run.iterate(a, node or cst.Name("_"))[0][0] for a in lists)
    return Repeated(op="zip", item=Sequence(op="tuple", items=items, args=items))


def _super(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    receiver = run.self_stack[-1]
    owner = run.env["<owner>"].attrs["owner"] if "<owner>" in run.env else None
    return Super(op="super", instance=receiver if isinstance(receiver, Instance) else None, after=owner)


def _tuple(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    value = args[0] if args else Sequence(op="tuple")
    if isinstance(value, Sequence):
        return Sequence(op="tuple", args=value.args, items=value.items, prefix=value.prefix)
    return value


def _list(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    value = _tuple(run, args, kwargs, node)
    if isinstance(value, Sequence):
        value.mutable = True
    return value


def _quantifier(every: bool) -> Any:
    def run_it(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
        if isinstance(args[0], Sequence):
            truths = [scalars.known_truth(v) for v in args[0].items]
            if None not in truths:
                return const(all(truths) if every else any(truths))
        return symbol(f"{'all' if every else 'any'}({scalars.text(args[0])})")

    return run_it


def _dict(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    return Mapping(op="dict", items=dict(kwargs))


def _slice(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    ends = ([const(None), *args] if len(args) == 1 else args) + [const(None)] * (3 - max(len(args), 2))
    return Sequence(op="slice", args=tuple(ends), items=tuple(ends))


def _type(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    return symbol(f"type({scalars.text(args[0])})")


def _sum(run: Interp, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    if isinstance(args[0], Sequence) and args[0].items:
        total = args[0].items[0]
        for item in args[0].items[1:]:
            total = run.binary("Add", total, item, node or cst.Name("_"))
        return total
    return symbol(f"sum({scalars.text(args[0])})")


_BUILTINS: dict[str, Any] = {
    "isinstance": _isinstance,
    "getattr": _getattr,
    "hasattr": _hasattr,
    "len": _len,
    "range": _range,
    "enumerate": _enumerate,
    "zip": _zip,
    "super": _super,
    "tuple": _tuple,
    "list": _list,
    "set": _tuple,
    "dict": _dict,
    "slice": _slice,
    "type": _type,
    "sum": _sum,
    "all": _quantifier(True),
    "any": _quantifier(False),
    "reversed": _tuple,
    "sorted": _tuple,
}

__all__ = ["SERVING", "Function", "call_external", "call_layer", "config_field", "make_layer"]
