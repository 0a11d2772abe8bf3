"""Layers of torch.nn, transformers and porter.runtime: their parameters, attributes and bases."""

from __future__ import annotations

import libcst as cst

from porter.analyze import ops_layers
from porter.analyze.run import Run
from porter.analyze.values import Instance, Layer, Scalar, Sequence, Tensor, Value, const, is_none

LAYERS = {
    "Linear": ("linear", ("in_features", "out_features", "bias", "device", "dtype")),
    "Conv1D": ("conv1d", ("out_features", "in_features")),
    "Embedding": ("embedding", ("num_embeddings", "embedding_dim", "padding_idx")),
    "LayerNorm": ("layer_norm", ("normalized_shape", "eps", "elementwise_affine", "bias")),
    "RMSNorm": ("rms_norm", ("normalized_shape", "eps", "elementwise_affine")),
    "Dropout": ("dropout", ("p", "inplace")),
    "Softmax": ("softmax", ("dim",)),
    "Identity": ("identity", ()),
    "ModuleList": ("module_list", ("items",)),
    "Sequential": ("sequential", ("items",)),
    "ModuleDict": ("module_dict", ("items",)),
    "Conv1d": ("sequence_conv", ("in_channels", "out_channels", "kernel_size")),
}
ACTIVATIONS = {
    "GELU": "gelu",
    "SiLU": "silu",
    "ReLU": "relu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "Softplus": "softplus",
}


# Functions of transformers.activations whose name is not the one that configs use.
ACTIVATION_NAMES = {"linear_act": "linear"}

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
    "StateMixer": ("state_mixer", ()),
}


def layer_attribute(run: Run, base: Layer, name: str, node: cst.CSTNode | None) -> Value:
    if name in base.attrs and isinstance(base.attrs[name], Value):
        found: Value = base.attrs[name]
        return found
    if base.kind == "qkv_linear" and name in ("num_heads", "num_kv_heads"):
        total = base.params.get(name)
        total = base.params["num_heads"] if total is None or is_none(total) else total
        return Scalar(op="leaf", text=f"local.{name}", size=total.size if isinstance(total, Scalar) else None)
    if base.kind == "sequence_conv":
        raise ops_layers.needs_state(run, node)
    if name in base.params and name != "bias":
        return base.params[name]
    if name == "dtype":
        return Scalar(op="dtype", text="self.dtype", attrs={"dtype": "same"})
    if name == "bias" and _is_false(base.params.get("bias")):
        return const(None)
    if name in ("weight", "bias") and base.kind in ("linear", "conv1d", "embedding", "layer_norm", "rms_norm"):
        return ops_layers.layer_weight(base, name)
    return Value(op="attribute", args=(base,), attrs={"name": name})


def _is_false(value: Value | None) -> bool:
    return isinstance(value, Scalar) and value.known and value.const is False


def make_layer(name: str, args: list[Value], kwargs: dict[str, Value]) -> Layer | None:
    """A layer of torch.nn or of the runtime by class name."""
    kind, names = LAYERS.get(name) or _RUNTIME.get(name) or ("", ())
    if not kind:
        return None
    params = dict(zip(names, args, strict=False)) | kwargs
    if kind == "linear" and "bias" not in params:
        params["bias"] = const(name != "ParallelLMHead")
    if kind == "sequential":
        params["items"] = Sequence(op="tuple", args=tuple(args), items=tuple(args))
    return Layer(op="layer", kind=kind, params=params, attrs={"class": name})


def init_base(run: Run, instance: Instance, args: list[Value], kwargs: dict[str, Value]) -> None:
    """`super().__init__(...)` of a class that inherits from a library layer keeps that layer's sizes."""
    assert instance.cls is not None
    for base in run.program.external_bases(instance.cls):
        layer = make_layer(base.rsplit(".", 1)[-1], args, kwargs)
        if layer is not None:
            instance.attrs["<layer>"] = layer


def construct(run: Run, short: str, args: list[Value], kwargs: dict[str, Value]) -> Value | None:
    if short in ("Parameter", "Buffer"):
        inner = args[0] if args else Value()
        shape = inner.shape if isinstance(inner, Tensor) else None
        if short == "Parameter":
            return Tensor(op="parameter", args=tuple(args[:1]), shape=shape)
        return inner
    layer = make_layer(short, args, kwargs)
    if layer is not None:
        run.world.created.append(layer)
    if layer is None and short in ACTIVATIONS:
        return Layer(op="layer", kind="activation", params={"name": const(ACTIVATIONS[short]), **kwargs})
    return layer
