"""Choose the parallel layer for every linear and embedding, by where its values come from and go to."""

from __future__ import annotations

from collections import defaultdict

import libcst as cst

from porter.analyze.facts import Facts, World
from porter.analyze.flows import ELEMENTWISE, RESHAPES, Flows, all_uses_are, behind, layer_of
from porter.analyze.ops_layers import is_linear
from porter.analyze.program import full_name
from porter.analyze.values import Instance, Layer, Scalar, Tensor, Value
from porter.passes import edit
from porter.passes.attend_layer import LINEAR
from porter.passes.base import Example, Pass, Stage

EMBEDDING = "porter.runtime.layers.embedding"
THROUGH = ELEMENTWISE | RESHAPES
GATED = ELEMENTWISE | {"unsqueeze"}
ROLES = {
    "row": "RowParallelLinear",
    "column": "ColumnParallelLinear",
    "replicated": "ReplicatedLinear",
    "head": "ParallelLMHead",
    "embedding": "VocabParallelEmbedding",
}


_BEFORE = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wi = nn.Linear(config.hidden_size, config.inner_size)
        self.wo = nn.Linear(config.inner_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids):
        return self.lm_head(self.wo(self.wi(self.embed(input_ids)).relu()))
"""
_AFTER = _BEFORE.replace(
    """\
from torch import nn
""",
    """\
from torch import nn
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import ColumnParallelLinear, RowParallelLinear
""",
).replace(
    """\
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wi = nn.Linear(config.hidden_size, config.inner_size)
        self.wo = nn.Linear(config.inner_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
""",
    """\
        self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.wi = ColumnParallelLinear(config.hidden_size, config.inner_size)
        self.wo = RowParallelLinear(config.inner_size, config.hidden_size)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, bias=False)
""",
)
_GATED = """\
import torch
from torch import nn
from porter.runtime.attention.paged import PagedAttention
from porter.runtime.layers.linear import QKVParallelLinear


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.qkv = QKVParallelLinear(config.hidden_size, config.dim, config.num_heads)
        self.gate = nn.Linear(config.hidden_size, config.num_heads)
        self.attn = PagedAttention(self.qkv.num_heads, config.dim, 0.125)
        self.out = nn.Linear(config.num_heads * config.dim, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dim = config.dim

    def forward(self, input_ids, positions, kv_caches, attn_metadata):
        hidden_states = self.embed(input_ids)
        query, key, value = self.qkv.split(self.qkv(hidden_states))
        heads = self.attn(query, key, value, kv_caches[0], attn_metadata).unflatten(-1, (-1, self.dim))
        gate = torch.sigmoid(self.gate(hidden_states)).unsqueeze(-1)
        return self.lm_head(self.out((heads * gate).flatten(-2)))
"""
_GATED_AFTER = (
    _GATED.replace(
        """\
from porter.runtime.layers.linear import QKVParallelLinear
""",
        """\
from porter.runtime.layers.linear import QKVParallelLinear
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import ColumnParallelLinear, RowParallelLinear
""",
    )
    .replace("nn.Embedding(", "VocabParallelEmbedding(")
    .replace("self.gate = nn.Linear(", "self.gate = ColumnParallelLinear(")
    .replace("self.out = nn.Linear(", "self.out = RowParallelLinear(")
    .replace(
        "nn.Linear(config.hidden_size, config.vocab_size, bias=False)",
        "ParallelLMHead(config.vocab_size, config.hidden_size, bias=False)",
    )
)


class ShardLayers(Pass):
    """A linear into attention or an activation splits its outputs, the one after it its inputs; the rest is replicated.

    Every linear and embedding takes `linear_method`, so that it can be quantized.
    """

    stage = Stage.SHARD
    flat = True
    reason = "its values flow so that it can be split over ranks this way"
    EXAMPLES = (Example(_BEFORE, _AFTER), Example(_GATED, _GATED_AFTER))

    def apply(self, facts: Facts) -> cst.Module:
        roles = _roles(facts)
        edits: dict[cst.CSTNode, edit.Edit] = {}
        imports: dict[str, set[str]] = {}
        for function in facts.called:
            for node in edit.walk(function.body):
                if isinstance(node, cst.Call):
                    edits.update(_create(facts, node, roles, imports))
        edits.update(_subclasses(facts, imports))
        return edit.add_imports(edit.rewrite(facts.program.tree, edits), imports)


def _roles(facts: Facts) -> dict[cst.CSTNode, set[str]]:
    """The role of every layer by the call that creates it, over all paths."""
    roles: dict[cst.CSTNode, set[str]] = defaultdict(set)
    for world in facts.worlds:
        found = _world_roles(world)
        by_layer = {id(layer): role for layer, role in found}
        for node, values in world.values.items():
            if not isinstance(node, cst.Call):
                continue
            for value in values:
                layer = _made(value)
                if (layer is not None and layer.node is node) or _is_linear_instance(value, node):
                    roles[node].add(by_layer.get(id(layer), "unused"))
    for seen in roles.values():
        if len(seen) > 1:
            seen.discard("unused")
    return roles


def _made(value: object) -> Layer | None:
    if isinstance(value, Layer):
        return value
    shell = getattr(value, "attrs", {}).get("<layer>")
    return shell if isinstance(shell, Layer) else None


def _is_linear_instance(value: object, node: cst.CSTNode) -> bool:
    layer = _made(value)
    return layer is not None and not isinstance(value, Layer) and getattr(value, "node", None) is node


def _world_roles(world: World) -> list[tuple[Layer, str]]:
    flows = Flows(world)
    roles: dict[int, tuple[Layer, str]] = {}

    def give(value: Tensor, role: str) -> None:
        layer = layer_of(value)
        if layer is not None:
            before = roles.get(id(layer))
            roles[id(layer)] = (layer, role if before is None or before[1] == role else "replicated")

    head = _head(world)
    rows: dict[int, list[Tensor]] = {}
    for value in flows.linears():
        layer = layer_of(value)
        if layer is None or layer.kind not in ("linear", "conv1d") or value is head:
            continue
        sources = _sources(value.args[0])
        if sources and all(_splits(s) for s in sources):
            rows[id(value)] = sources
    ends = set(rows)
    for value in flows.linears():
        if value is head:
            give(value, "head")
        elif id(value) in rows and all(_safe(flows, s, ends) for s in rows[id(value)]):
            give(value, "row")
            for source in rows[id(value)]:
                if (
                    source.op == "linear"
                    and (layer := layer_of(source)) is not None
                    and layer.kind in ("linear", "conv1d")
                ):
                    give(source, "column")
    for value in flows.linears():
        layer = layer_of(value)
        if layer is not None and id(layer) not in roles:
            give(value, "replicated")
    for value in flows.of("embedding"):
        give(value, "embedding" if value.args[0].op == "input_ids" else "positions")
    return list(roles.values())


def _sources(value: Value) -> list[Tensor]:
    """What a linear's input is made of. Heads may be laid out anew; the features of a linear must stay in its order,
    or a rank would hold others than the row it multiplies them with."""
    found: list[Tensor] = []
    for source in behind(value, ELEMENTWISE):
        inner = _heads(source) if source.op in RESHAPES else []
        found += inner or [source]
    return found


def _heads(value: Tensor) -> list[Tensor]:
    """The attention, and the gates of its heads, that a value lays out anew; empty if it is made of anything else."""
    found: list[Tensor] = []
    for part in behind(value.args[0], GATED):
        inner = behind(part, THROUGH) if part.op in RESHAPES else [part]
        if any(v.op != "paged_attention" and v is not part for v in inner):
            return []
        found += inner
    return found if any(v.op == "paged_attention" for v in found) else []


def _splits(value: Tensor) -> bool:
    """Whether a value can be split over ranks: an attention with local heads, or a linear that may be a column."""
    layer = layer_of(value)
    if value.op == "paged_attention":
        heads = layer.params.get("num_heads") if layer is not None else None
        return isinstance(heads, Scalar) and heads.text.endswith(".num_heads")
    return value.op == "linear" and layer is not None and layer.kind in ("linear", "conv1d", "merged_linear")


def _safe(flows: Flows, source: Tensor, ends: set[int]) -> bool:
    through = GATED | {"flatten"} if _gates_heads(flows, source) else ELEMENTWISE
    return source.op == "paged_attention" or all_uses_are(flows, source, through, ends)


def _gates_heads(flows: Flows, source: Tensor) -> bool:
    """Whether a linear has one number for each head, which an elementwise product spreads over the head."""
    seen: list[Value] = [source]
    for value in seen:
        seen += [use for use in flows.uses[id(value)] if use.op in ELEMENTWISE and use not in seen]
        if any(use.op == "unsqueeze" for use in flows.uses[id(value)]):
            return True
    return False


def _head(world: World) -> Tensor | None:
    """The linear whose output are the logits."""
    result = world.result
    if result is None:
        return None
    found = [v for v in result.walk(frozenset({"linear"})) if v.op == "linear"]
    return found[0] if found and isinstance(found[0], Tensor) else None


def _create(
    facts: Facts, node: cst.Call, roles: dict[cst.CSTNode, set[str]], imports: dict[str, set[str]]
) -> dict[cst.CSTNode, edit.Edit]:
    name = full_name(node.func).rsplit(".", 1)[-1]
    if node not in roles or name in ROLES.values():
        return {}
    if any(_has_own_forward(facts, v) for v in facts.values(node)):
        return {}
    kinds = {_made(v).kind for v in facts.values(node) if _made(v) is not None}  # type: ignore[union-attr]
    seen = roles[node]
    role = seen.pop() if len(seen) == 1 else "replicated"
    if not kinds <= {"linear", "conv1d", "embedding"} or role not in ROLES:
        return {}
    target = ROLES[role]
    imports.setdefault(EMBEDDING if role in ("head", "embedding") else LINEAR, set()).add(target)
    if kinds == {"conv1d"}:
        facts.notes.setdefault("transposed", set()).add(_attribute(facts, node))
    arguments = _arguments(node, kinds, role)
    return {node: edit.replace(f"{target}({', '.join(arguments)})")}


def _has_own_forward(facts: Facts, value: object) -> bool:
    """A subclass that computes more than the lookup or the product stays a class of the port."""
    layer = _made(value)
    if not isinstance(value, Instance) or value.cls is None or layer is None:
        return False
    forward = facts.program.method(value.cls, "forward")
    if forward is None or layer.kind == "embedding":
        return forward is not None
    results = [r.result for r in facts.calls_of(forward.node) if r.receiver is value]
    return not any(r is not None and is_linear(r, layer) for r in results)


def _subclasses(facts: Facts, imports: dict[str, set[str]]) -> dict[cst.CSTNode, edit.Edit]:
    """Token embeddings with a forward of their own (a scale, say) inherit from the parallel embedding."""
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for world in facts.worlds:
        tokens = {id(v.attrs.get("layer")) for v in Flows(world).of("embedding") if v.args[0].op == "input_ids"}
        for values in world.values.values():
            for value in values:
                if isinstance(value, Instance) and _has_own_forward(facts, value) and id(_made(value)) in tokens:
                    edits.update(_rebased(facts, value))
    if edits:
        imports.setdefault(EMBEDDING, set()).add("VocabParallelEmbedding")
    return edits


def _rebased(facts: Facts, value: Instance) -> dict[cst.CSTNode, edit.Edit]:
    assert value.cls is not None
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for base in value.cls.node.bases:
        if full_name(base.value).rsplit(".", 1)[-1] == "Embedding":
            edits[base.value] = edit.replace("VocabParallelEmbedding")
    for node in edit.walk(value.cls.node) if edits else ():
        if isinstance(node, cst.Call) and edit.code(node.func) == "super().__init__":
            sizes = ", ".join(_arguments(node, {"embedding"}, "embedding"))
            edits[node] = edit.replace(f"super().__init__({sizes}, linear_method=linear_method)")
    return edits


def _attribute(facts: Facts, node: cst.Call) -> str:
    assign = edit.enclosing(facts.program.tree, node, cst.Assign)
    target = edit.targets(assign)[0] if assign is not None else None
    return target.attr.value if isinstance(target, cst.Attribute) else ""


def _arguments(node: cst.Call, kinds: set[str], role: str) -> list[str]:
    """The sizes and bias of a layer, in the order of its parallel form."""
    named = {a.keyword.value: edit.code(a.value) for a in node.args if a.keyword is not None}
    plain = [edit.code(a.value) for a in node.args if a.keyword is None]

    def get(position: int, *keys: str) -> str:
        return next((named[k] for k in keys if k in named), plain[position] if position < len(plain) else "")

    if role == "embedding":
        return [get(0, "num_embeddings"), get(1, "embedding_dim")]
    if kinds == {"conv1d"}:
        return [get(1, "nx"), get(0, "nf")]
    inputs, outputs = get(0, "in_features", "input_size"), get(1, "out_features", "output_size")
    bias = get(2, "bias")
    sizes = [outputs, inputs] if role == "head" else [inputs, outputs]
    default = "False" if role == "head" else "True"
    return (
        [*sizes, f"bias={bias}"]
        if bias and bias != default
        else [*sizes, "bias=True"]
        if (role == "head" and not bias)
        else [*sizes, "bias=False"]
        if bias == "False"
        else sizes
    )
