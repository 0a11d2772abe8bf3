"""Calls of library layers, of the runtime's layers and of attention functions."""

from __future__ import annotations

import libcst as cst

from porter.analyze.poly import Poly
from porter.analyze.run import Run
from porter.analyze.transfer import build, shape_of
from porter.analyze.values import ONE, Layer, Repeated, Scalar, Sequence, Shape, Tensor, Value, const, is_none
from porter.errors import Refusal


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
    if not is_linear(result, shell, source) or not isinstance(result, Tensor):
        return result
    return build("linear", (source, shell), result.shape, result.node, layer=shell, sizes_only=False)


def is_linear(result: Value, shell: Layer, source: Value | None = None) -> bool:
    """Whether a subclass of nn.Linear returned its product, of `source` if that is given, and nothing more."""
    if result.op == "linear":
        return result.attrs.get("layer") is shell
    inner = result.args[0] if result.op == "add" and result.args[1].op == "layer_weight" else result
    if inner.op != "matmul" or inner.args[1].op != "permute" or (source is not None and inner.args[0] is not source):
        return False
    weight = inner.args[1].args[0]
    return weight.op == "layer_weight" and weight.args[0] is shell


def layer(run: Run, target: Layer, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    """Call a library layer."""
    values = [*args, *kwargs.values()]
    source = values[0] if values else Value()
    kind = target.kind
    if kind in ("dropout", "identity"):
        return source
    shape = shape_of(source)
    if kind == "softmax":
        return build("softmax", (source, target.params.get("dim", const(-1))), shape, node)
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
    if kind == "sequence_conv":
        raise needs_state(run, node)
    return _runtime_layer(run, target, args, kwargs, shape, node)


def _runtime_layer(
    run: Run,
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
        heads, dim = target.params.get("num_heads"), target.params.get("v_head_dim", target.params.get("head_dim"))
        width = (
            heads.size * dim.size
            if isinstance(heads, Scalar) and isinstance(dim, Scalar) and heads.size is not None and dim.size is not None
            else Poly.symbol("<attention>")
        )
        tokens = _token_dims(query.shape)
        return build("paged_attention", tuple(args), (*tokens, width), node, layer=target, sizes_only=False)
    if kind == "state_mixer":
        return build("state_mixer", (args[0], target), shape, node, layer=target, sizes_only=False)
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
    run: Run, base: Layer, name: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
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


def attention(run: Run, short: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
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


def needs_state(run: Run, node: cst.CSTNode | None) -> Refusal:
    """For a convolution along the sequence, which no paged cache of keys and values can serve."""
    why = (
        "a convolution along the sequence, as state-space and linear-attention layers have; it keeps a state from "
        "token to token, for which the runtime has no cache"
    )
    what = " ".join(run.program.tree.code_for_node(node).split())[:90] if node is not None else "nn.Conv1d"
    return run.refuse(node, what, why, "use an engine that has one", "P201")
