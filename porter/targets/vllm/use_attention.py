"""Use vLLM's Attention, with its rotary embedding before it, for the runtime's paged attention layers."""

from __future__ import annotations

import libcst as cst

from porter.errors import Refusal
from porter.passes import edit
from porter.passes.base import Example
from porter.spec import ATTENTION, ModelSpec
from porter.targets.base import TargetPass
from porter.targets.vllm.imports import LAYERS, drop_imports, used

PAGED = "porter.runtime.attention.paged"
SUPPORT = ".support"
_SLOPES = "alibi_slopes"
_NAMES = {
    "sliding_window": "per_layer_sliding_window",
    "softcap": "logits_soft_cap",
    "num_kv_heads": "num_kv_heads",
    "sinks": "sinks",
}

_BEFORE = """\
from torch import nn
from porter.runtime.attention.paged import PagedAttentionWithRoPE


class OakAttention(nn.Module):
    def __init__(self, config, *, vllm_config, prefix):
        super().__init__()
        self.attn = PagedAttentionWithRoPE(
            self.qkv_proj.num_heads,
            config.head_dim,
            self.scaling,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            rope_parameters=config.rope_parameters,
            max_position=config.max_position_embeddings,
            sliding_window=config.sliding_window,
        )

    def forward(self, positions, hidden_states, kv_cache, attn_metadata):
        query, key, value = self.qkv_proj.split(self.qkv_proj(hidden_states))
        query = self.q_norm(query.view(-1, 2, 8))
        return self.attn(positions, query, key, value, kv_cache, attn_metadata)
"""
_AFTER = """\
from torch import nn
from .support import supported_rope
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import get_rope


class OakAttention(nn.Module):
    def __init__(self, config, *, vllm_config, prefix):
        super().__init__()
        self.rotary_emb = get_rope(config.head_dim, config.max_position_embeddings, is_neox_style=True, \
rope_parameters=supported_rope(config.rope_parameters))
        self.attn = Attention(self.qkv_proj.num_heads, config.head_dim, self.scaling, \
num_kv_heads=self.qkv_proj.num_kv_heads, per_layer_sliding_window=config.sliding_window, \
cache_config=vllm_config.cache_config, quant_config=vllm_config.quant_config, prefix=f"{prefix}.attn")

    def forward(self, positions, hidden_states, kv_cache, attn_metadata):
        query, key, value = self.qkv_proj.split(self.qkv_proj(hidden_states))
        query = self.q_norm(query.view(-1, 2, 8))
        return self.attn(*self.rotary_emb(positions, query.flatten(1), key), value)
"""
_CHOICE = "config.rope_parameters if config.rotated[layer_idx] else None"
_SOME = _BEFORE.replace("config, *", "config, layer_idx, *").replace(
    "rope_parameters=config.rope_parameters", f"rope_parameters=({_CHOICE}) if config.windows else {{}}"
)
_SOME_AFTER = (
    _AFTER.replace("config, *", "config, layer_idx, *")
    .replace("supported_rope\n", "supported_rope, unrotated\n")
    .replace(
        "        self.rotary_emb",
        f"        rope_parameters = ({_CHOICE}) if config.windows else {{}}\n        self.rotary_emb",
    )
    .replace(
        "supported_rope(config.rope_parameters))",
        "supported_rope(rope_parameters)) if rope_parameters is not None else unrotated",
    )
)
_SMALL = _BEFORE.replace("sliding_window=config.sliding_window", "v_head_dim=config.v_head_dim")
_SMALL_AFTER = (
    _AFTER.replace("supported_rope\n", "AttentionWithSmallValues, supported_rope\n")
    .replace("= Attention(", "= AttentionWithSmallValues(config.v_head_dim, ")
    .replace("per_layer_sliding_window=config.sliding_window, ", "")
)


class UseAttention(TargetPass):
    """vLLM has one attention layer; it takes window, cap, sinks and slopes, and finds its cache by its name."""

    reason = "vLLM's attention layer computes this kind of attention"
    EXAMPLES = (Example(_BEFORE, _AFTER), Example(_SOME, _SOME_AFTER), Example(_SMALL, _SMALL_AFTER))

    def apply(self, tree: cst.Module, spec: ModelSpec) -> cst.Module:
        kinds = used(tree, PAGED)
        if not kinds:
            return tree
        walk = _Replace()
        after = drop_imports(tree, dict.fromkeys(kinds, PAGED)).visit(walk)
        assert isinstance(after, cst.Module)
        return edit.add_imports(after, walk.imports)


class _Replace(cst.CSTTransformer):
    def __init__(self) -> None:
        super().__init__()
        self.imports: dict[str, list[str]] = {f"{LAYERS}.attention": ["Attention"]}
        self.inside = False  # a class that makes an attention layer
        self.flat: set[str] = set()  # what the current function takes from a packed projection, `[tokens, features]`

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self.inside = any(isinstance(n, cst.Call) and edit.code(n.func) in ATTENTION for n in edit.walk(node))

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        bound = [(n, edit.code(t)) for n in edit.walk(node.body) if isinstance(n, cst.Assign) for t in edit.targets(n)]
        split = {name for n, name in bound if isinstance(n.value, cst.Call) and _is_split(n.value)}
        self.flat = {name for name in split if [other for _, other in bound].count(name) == 1}

    def leave_SimpleStatementLine(self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine):  # type: ignore[no-untyped-def]
        made = updated_node.body[0] if len(updated_node.body) == 1 else None
        call = made.value if isinstance(made, cst.Assign) else None
        if not isinstance(made, cst.Assign) or not isinstance(call, cst.Call) or edit.code(call.func) not in ATTENTION:
            return updated_node
        lines = self._creation(edit.code(made.targets[0].target), ATTENTION[edit.code(call.func)], call)
        return cst.FlattenSentinel(edit.block("\n".join(lines)))

    def _creation(self, target: str, kind: str, call: cst.Call) -> list[str]:
        name = target.removeprefix("self.")
        if "." in name or name == target:
            why = "the attention layer is no attribute, so vLLM can't name it"
            raise Refusal("", 0, target, why, "assign it to self")
        given = {a.keyword.value: edit.code(a.value) for a in call.args if a.keyword is not None}
        sizes = [edit.code(a.value) for a in call.args if a.keyword is None]
        lines = self._rope(sizes[1], given) if kind == "rope" else []
        fields = [*sizes, *(f"{_NAMES[k]}={v}" for k, v in given.items() if k in _NAMES)]
        if kind == "alibi":
            self._import(SUPPORT, "local_slopes")
            fields.append(f"alibi_slopes=local_slopes({given[_SLOPES]}, {sizes[0]})")
        if "sinks" in given:
            self._import(SUPPORT, "shard_heads")
            lines.append(f"shard_heads({given['sinks']})")
        fields += [
            "cache_config=vllm_config.cache_config",
            "quant_config=vllm_config.quant_config",
            f'prefix=f"{{prefix}}.{name}"',
        ]
        if "v_head_dim" not in given:
            return [*lines, f"{target} = Attention({', '.join(fields)})"]
        self._import(SUPPORT, "AttentionWithSmallValues")
        return [*lines, f"{target} = AttentionWithSmallValues({given['v_head_dim']}, {', '.join(fields)})"]

    def _rope(self, head_dim: str, given: dict[str, str]) -> list[str]:
        self._import(SUPPORT, "supported_rope")
        self._import(f"{LAYERS}.rotary_embedding", "get_rope")
        neox = {"False": "True", "True": "False"}.get(given.get("interleaved", "False"))
        neox = neox or f"not {given['interleaved']}"
        turned = f", {given['rotary_dim']}" if "rotary_dim" in given else ""
        parameters = given["rope_parameters"]
        sizes = f"{head_dim}, {given['max_position']}, is_neox_style={neox}"
        if _is_given(edit.parse(parameters)):
            return [f"self.rotary_emb = get_rope({sizes}, rope_parameters=supported_rope({parameters}{turned}))"]
        self._import(SUPPORT, "unrotated")
        made = f"get_rope({sizes}, rope_parameters=supported_rope(rope_parameters{turned}))"
        return [
            f"rope_parameters = {parameters}",
            f"self.rotary_emb = {made} if rope_parameters is not None else unrotated",
        ]

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        texts = [edit.code(a.value) for a in updated_node.args]
        if not self.inside or edit.code(updated_node.func) != "self.attn" or texts[-1:] != ["attn_metadata"]:
            return updated_node
        if len(texts) == 5:
            last = updated_node.args[2].with_changes(comma=cst.MaybeSentinel.DEFAULT)
            return updated_node.with_changes(args=[*updated_node.args[:2], last])
        query, key = (text if text in self.flat else f"{text}.flatten(1)" for text in texts[1:3])
        rotated = f"f(*self.rotary_emb({texts[0]}, {query}, {key}), {texts[3]})"
        return updated_node.with_changes(args=edit.parse(rotated).args)  # type: ignore[attr-defined]

    def _import(self, module: str, name: str) -> None:
        self.imports.setdefault(module, []).append(name)


def _is_given(parameters: cst.BaseExpression) -> bool:
    """Whether every layer rotates: None, which a choice or a table can give, stands for a layer that does not."""
    return isinstance(parameters, cst.Attribute | cst.Dict)


def _is_split(call: cst.Call) -> bool:
    return isinstance(call.func, cst.Attribute) and call.func.attr.value == "split" and len(call.args) == 1
