"""Rewrite tensors of shape [batch, sequence, ...] to flat tokens [num_tokens, ...]."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts, line_of
from porter.analyze.flows import ELEMENTWISE
from porter.analyze.values import Layer, Repeated, Scalar, Sequence, Tensor, Value
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged
from porter.passes.flat_layout import LAYOUT, apart, flat_size, is_module, layout, receiver, refuse
from porter.passes.flat_sizes import token_product, unpacked_shape

# Where an operation takes its dim when it is not a keyword: method position after the receiver.
DIM_AT = {
    "softmax": 0,
    "log_softmax": 0,
    "mean": 0,
    "sum": 0,
    "max": 0,
    "min": 0,
    "argmax": 0,
    "cumsum": 0,
    "prod": 0,
    "norm": 1,
    "split": 1,
    "chunk": 1,
    "topk": 1,
    "unbind": 0,
    "cat": 0,
    "stack": 0,
    "gather": 0,
    "repeat_interleave": 1,
    "var": 0,
    "std": 0,
    "amax": 0,
    "all": 0,
    "any": 0,
    "logsumexp": 0,
    "sort": 0,
    "split_with_sizes": 1,
    "flip": 0,
}
# Operations that give each token its own result, whatever the layout.
TOKENWISE = ELEMENTWISE | frozenset(
    {
        "linear",
        "embedding",
        "activation",
        "rms_norm",
        "paged_attention",
        "state_mixer",
        "fused_moe",
        "dropout",
        "where",
        "masked_fill",
        "log",
        "log2",
        "sin",
        "cos",
        "reciprocal",
        "sign",
        "round",
        "floor",
        "ceil",
        "isnan",
        "isinf",
        "nan_to_num",
        "clip",
        "positive",
        "long",
        "int",
        "bool",
        "half",
        "bfloat16",
        "double",
        "detach",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "logical_and",
        "logical_or",
        "logical_not",
        "logical_xor",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "floor_divide",
        "remainder",
        "atan2",
        "rsub",
        "relu6",
        "hardtanh",
        "leaky_relu",
        "elu",
        "mish",
        "softsign",
        "log1p",
        "expm1",
        "atan",
        "tan",
        "addcmul",
        "addcdiv",
        "matmul",
        "bmm",
        "einsum",
        "baddbmm",
        "setitem",
        "copy",
        "one_hot",
        "lerp",
        "fmod",
        "row",
        "piece",
        "add_mask",
        "cpu",
        "cuda",
        "fill",
        "zero",
        "shard",
        "polar",
        "view_as_complex",
        "view_as_real",
    }
)
_BEFORE = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.num_groups = config.num_groups

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        batch, length, width = hidden_states.shape
        groups = hidden_states.view(batch, length, self.num_groups, width // self.num_groups)
        groups = groups.transpose(1, 2).softmax(dim=3).transpose(1, 2)
        return groups.reshape(batch, length, width)
"""
_AFTER = _BEFORE.replace(
    """\
        batch, length, width = hidden_states.shape
        groups = hidden_states.view(batch, length, self.num_groups, width // self.num_groups)
        groups = groups.transpose(1, 2).softmax(dim=3).transpose(1, 2)
        return groups.reshape(batch, length, width)
""",
    """\
        width = hidden_states.shape[-1]
        groups = hidden_states.unflatten(-1, (self.num_groups, width // self.num_groups))
        groups = groups.softmax(dim=-1)
        return groups.flatten(-2)
""",
)
_UNCHANGED = _BEFORE.replace(
    "        self.num_groups = config.num_groups\n",
    "",
).replace(
    """\
        batch, length, width = hidden_states.shape
        groups = hidden_states.view(batch, length, self.num_groups, width // self.num_groups)
        groups = groups.transpose(1, 2).softmax(dim=3).transpose(1, 2)
        return groups.reshape(batch, length, width)
""",
    """\
        return hidden_states / hidden_states.norm(dim=-1, keepdim=True)
""",
)
_UNCHANGED_2 = _UNCHANGED.replace(
    "hidden_states / hidden_states.norm(dim=-1, keepdim=True)",
    "hidden_states + torch.ones(self.embed.embedding_dim).expand_as(hidden_states)",
).replace("from torch import nn\n", "import torch\nfrom torch import nn\n", 1)


class FlattenTokens(Pass):
    """The engine runs the tokens of all sequences as one row; what laid out batch and sequence has nothing to do.

    A layout operation goes when the flat layouts before and after it agree; otherwise it is written for the flat
    layout. An operation that mixes tokens is refused.
    """

    stage = Stage.FLATTEN
    reason = "tokens are flat: [num_tokens, ...]"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (
        Unchanged(_UNCHANGED, "a dim counted from the end is the same dim of a token"),
        Unchanged(_UNCHANGED_2, "what is the same for every token is so in any layout"),
    )

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for function in sorted(facts.called, key=lambda f: line_of(facts.program.tree, f)):
            if function.name.value != "__init__":
                for node in edit.walk(function.body):
                    edits.update(_flatten(facts, node))
        return edit.rewrite(facts.program.tree, edits)


def _flatten(facts: Facts, node: cst.CSTNode) -> dict[cst.CSTNode, edit.Edit]:
    values = facts.values(node)
    if isinstance(node, cst.Assign) and len(node.targets) == 1 and isinstance(node.targets[0].target, cst.Tuple):
        return unpacked_shape(facts, node)
    size = flat_size(facts, node)
    if size is not None:
        return {node: edit.replace(size)}
    if isinstance(node, cst.BinaryOperation):
        counted = token_product(facts, node)
        if counted:
            return counted
    made = [v for v in values if isinstance(v, Tensor) and v.node is node and v.args]
    pieces = [
        v.items[0]
        for v in values
        if isinstance(v, Sequence)
        and v.op in ("pieces", "record", "tuple")
        and v.items
        and isinstance(v.items[0], Tensor)
        and v.items[0].node is node
    ]
    split = [v.item for v in values if isinstance(v, Repeated) and v.op == "split"]
    pieces += [item for item in split if isinstance(item, Tensor) and item.node is node]
    if made:
        return _operation(facts, node, made)
    if pieces:
        return _dim(facts, node, [p for p in pieces if isinstance(p, Tensor)], "split")
    return {}


def _operation(facts: Facts, node: cst.CSTNode, made: list[Tensor]) -> dict[cst.CSTNode, edit.Edit]:
    if all(_is_device_move(v) for v in made):
        return {node: receiver}
    sources = [v.args[0] for v in made]
    if not any(
        apart(v.shape) or (isinstance(s, Tensor) and apart(s.shape)) for v, s in zip(made, sources, strict=True)
    ):
        return {node: receiver} if all(v.op == "contiguous" for v in made) else {}
    if all(v.op in LAYOUT for v in made):
        return layout(facts, node, made)
    if made[0].op in ("matmul", "bmm", "einsum", "baddbmm") and not made[0].sizes_only:
        return _product(facts, node, made)
    if made[0].op not in TOKENWISE and not made[0].sizes_only:
        _check_known(facts, node, made[0])
    return _dim(facts, node, made, made[0].op)


def _check_known(facts: Facts, node: cst.CSTNode, value: Tensor) -> None:
    """Refuse an operation that may look beyond one token: only those along a named dim are rewritten."""
    if value.op == "layer_norm" and isinstance(value.args[1], Layer):
        return
    if value.op == "layer_norm":
        sizes = value.args[1].items if isinstance(value.args[1], Sequence) else (value.args[1],)
        if len(sizes) == 1:
            return
        raise refuse(facts, node, "it normalises over more than the features of a token")
    if value.op == "unknown":
        raise refuse(facts, node, f"not understood: {value.attrs.get('why', 'its operation')}")
    if value.op not in DIM_AT:
        raise refuse(facts, node, f"{value.op} may mix tokens")
    if isinstance(node, cst.Call) and _dim_argument(node, value.op) is None:
        raise refuse(facts, node, f"{value.op} without a dim works over all tokens")


def _is_device_move(value: Tensor) -> bool:
    """`x.to(y.device)`: the engine places tensors."""
    return value.op == "to" and all(isinstance(a, Scalar) and a.op == "device" for a in value.args[1:])


def _product(facts: Facts, node: cst.CSTNode, made: list[Tensor]) -> dict[cst.CSTNode, edit.Edit]:
    """A matrix product is fine as long as tokens stay rows of its left side."""
    for value in made:
        right = value.args[1]
        if isinstance(right, Tensor) and right.shape is not None and any(s.has_tokens for s in right.shape):
            raise refuse(facts, node, "it multiplies tokens with tokens outside of attention")
    return {}


def _dim(facts: Facts, node: cst.CSTNode, made: list[Tensor], op: str) -> dict[cst.CSTNode, edit.Edit]:
    """Give an operation along a dim the number of that dim in the flat layout."""
    if not isinstance(node, cst.Call) or made[0].sizes_only:
        return {}
    name = node.func.attr.value if isinstance(node.func, cst.Attribute) else edit.code(node.func)
    if name not in DIM_AT:
        return {}
    arg = _dim_argument(node, name)
    source = _tensor_in(made[0])
    if arg is None or source is None or not apart(source.shape):
        return {}
    number = _number(facts, arg.value)
    if number is None or source.shape is None:
        raise refuse(facts, node, "its dim is not a known number")
    axis = number % len(source.shape)
    if source.shape[axis].has_tokens:
        raise refuse(facts, node, "it works along the sequence, which the engine does not have as a dim")
    place_from_end = axis - len(source.shape)
    if any(s.has_tokens for s in source.shape[axis:]):
        place_from_end = -sum(not s.has_tokens for s in source.shape[axis:])
    if place_from_end == number:
        return {}
    return {arg.value: edit.replace(str(place_from_end))}


def _dim_argument(node: cst.Call, name: str) -> cst.Arg | None:
    """The argument of a call that says along which dim it works."""
    is_function = isinstance(node.func, cst.Attribute) and is_module(node.func.value)
    place = DIM_AT[name] + (1 if is_function else 0)
    named = [a for a in node.args if a.keyword is not None and a.keyword.value in ("dim", "axis")]
    if named:
        return named[0]
    plain = place < len(node.args) and all(a.keyword is None for a in node.args[: place + 1])
    return node.args[place] if plain else None


def _tensor_in(value: Tensor) -> Tensor | None:
    first: Value = value.args[0]
    if isinstance(first, Sequence) and first.items:
        first = first.items[0]
    if isinstance(first, Repeated):
        first = first.item
    return first if isinstance(first, Tensor) else None


def _number(facts: Facts, node: cst.BaseExpression) -> int | None:
    values = [v.const for v in facts.values(node) if isinstance(v, Scalar) and v.known]
    return values[0] if values and isinstance(values[0], int) else None
