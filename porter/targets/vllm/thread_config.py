"""Hand down vLLM's configuration and each layer's name instead of `linear_method`."""

from __future__ import annotations

import libcst as cst

from porter.analyze.program import ClassInfo, Program
from porter.passes import edit
from porter.passes.base import Example, Unchanged
from porter.passes.thread_linear_method import NAME, TAKES
from porter.spec import ModelSpec
from porter.targets.base import TargetPass
from porter.targets.vllm.naming import layer_name, with_index

LINEARS = TAKES - {"VocabParallelEmbedding", "ParallelLMHead", "FusedMoE"}
PARAMETERS = {"vllm.config": ["VllmConfig"]}

_BEFORE = """\
from torch import nn
from porter.runtime.layers.linear import ReplicatedLinear
from porter.runtime.layers.embedding import VocabParallelEmbedding


class OakLayer(nn.Module):
    def __init__(self, config, linear_method=None):
        super().__init__()
        self.mix = ReplicatedLinear(config.hidden_size, config.hidden_size, linear_method=linear_method)

    def forward(self, x):
        return self.mix(x)


class OakForCausalLM(nn.Module):
    def __init__(self, config, linear_method=None):
        super().__init__()
        self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size, linear_method=linear_method)
        self.layers = nn.ModuleList(
            [OakLayer(config, linear_method=linear_method) for _ in range(config.num_layers)]
        )
"""
_AFTER = """\
from torch import nn
from porter.runtime.layers.linear import ReplicatedLinear
from porter.runtime.layers.embedding import VocabParallelEmbedding
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import maybe_prefix


class OakLayer(nn.Module):
    def __init__(self, config, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.mix = ReplicatedLinear(config.hidden_size, config.hidden_size, \
quant_config=vllm_config.quant_config, prefix=f"{prefix}.mix", return_bias=False)

    def forward(self, x):
        return self.mix(x)


class OakForCausalLM(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        vllm_config.cache_config.sliding_window = None  # each layer states its own
        self.config = config
        self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size, \
quant_config=vllm_config.quant_config, prefix=maybe_prefix(prefix, "embed"))
        self.layers = nn.ModuleList(
            [OakLayer(config, vllm_config=vllm_config, prefix=maybe_prefix(prefix, \
f"layers.{i}")) for i in range(config.num_layers)]
        )
"""
_INIT = """\
def __init__(self, config, linear_method=None):
    super().__init__(config, linear_method=linear_method)
"""
_CONFIG = """\
config = vllm_config.model_config.hf_config
vllm_config.cache_config.sliding_window = None  # each layer states its own
"""
_UNCHANGED = "from torch import nn\n\n\nclass OakGate(nn.Module):\n    def forward(self, x):\n        return x\n"


class ThreadConfig(TargetPass):
    """vLLM builds a model from its own configuration, finds layers by name, and gives no linear method."""

    reason = "vLLM hands down its configuration and the names of layers"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (Unchanged(_UNCHANGED, "nothing in it is sharded or quantized"),)

    def apply(self, tree: cst.Module, spec: ModelSpec) -> cst.Module:
        program = Program.read(tree)
        entry = program.classes.get(spec.architecture)
        names = frozenset(c.name for c in program.mro(entry)) if entry is not None else frozenset()
        walk = _Thread(spec.architecture, names)
        after = _with_init(tree, entry).visit(walk)
        assert isinstance(after, cst.Module)
        if not walk.changed:
            return tree
        return edit.add_imports(after, {**PARAMETERS, "vllm.model_executor.models.utils": ["maybe_prefix"]})


def _with_init(tree: cst.Module, entry: ClassInfo | None) -> cst.Module:
    """The entry with an __init__ of its own, for it takes other arguments than its bases."""
    if entry is None or "__init__" in entry.methods:
        return tree
    body = [s for s in entry.node.body.body if not isinstance(s, cst.SimpleStatementLine) or edit.code(s) != "pass"]
    block = entry.node.body.with_changes(body=[*body, *edit.block(_INIT)])
    return edit.rewrite(tree, {entry.node: lambda updated: updated.with_changes(body=block)})


class _Thread(cst.CSTTransformer):
    """`entries` are the entry class and its bases, whose own prefix may be empty."""

    def __init__(self, entry: str, entries: frozenset[str]) -> None:
        super().__init__()
        self.entry, self.entries = entry, entries
        self.stack: list[cst.CSTNode] = []
        self.changed = False

    def on_visit(self, node: cst.CSTNode) -> bool:
        self.stack.append(node)
        return super().on_visit(node)

    def on_leave(self, original_node: cst.CSTNodeT, updated_node: cst.CSTNodeT) -> object:  # type: ignore[override]
        self.stack.pop()
        return super().on_leave(original_node, updated_node)

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        params = updated_node.params
        kept = [p for p in params.params if p.name.value != NAME]
        if len(kept) == len(params.params):
            return updated_node
        self.changed = True
        owner = self._class()
        if owner is not None and owner.name.value == self.entry and updated_node.name.value == "__init__":
            return _with_parameters(_with_config(updated_node), kept[:1])
        return _with_parameters(updated_node, kept)

    def leave_ListComp(self, original_node: cst.ListComp, updated_node: cst.ListComp) -> cst.BaseExpression:
        return with_index(updated_node) if _reads(original_node, NAME) else updated_node

    def leave_GeneratorExp(self, original_node: cst.GeneratorExp, updated_node: cst.GeneratorExp) -> cst.BaseExpression:
        return with_index(updated_node) if _reads(original_node, NAME) else updated_node

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        kept = [a for a in updated_node.args if edit.code(a.value) != NAME]
        if len(kept) == len(updated_node.args):
            return updated_node
        self.changed = True
        name = edit.code(updated_node.func)
        below = layer_name(self.stack, original_node)
        arguments = [f"prefix={self._prefix(below)}"]
        if name in TAKES or (name == "super().__init__" and self._inherits_layer()):
            arguments.insert(0, "quant_config=vllm_config.quant_config")
        else:
            arguments.insert(0, "vllm_config=vllm_config")
        if name in LINEARS:
            arguments.append("return_bias=False")
        return with_arguments(updated_node.with_changes(args=kept), arguments)

    def _prefix(self, below: str) -> str:
        if not below:
            return "prefix"
        text = f'f"{below}"' if "{" in below else f'"{below}"'
        owner = self._class()
        if owner is None or owner.name.value in self.entries:
            return f"maybe_prefix(prefix, {text})"
        return f'f"{{prefix}}.{below}"'

    def _class(self) -> cst.ClassDef | None:
        return next((n for n in reversed(self.stack) if isinstance(n, cst.ClassDef)), None)

    def _inherits_layer(self) -> bool:
        owner = self._class()
        return owner is not None and any(edit.code(b.value) in TAKES for b in owner.bases)


def with_arguments(call: cst.Call, arguments: list[str]) -> cst.Call:
    """A call with more arguments at its end."""
    new = edit.parse(f"f({', '.join(arguments)})")
    assert isinstance(new, cst.Call)
    args = [a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in call.args]
    return call.with_changes(args=[*args, *new.args])


def _with_parameters(node: cst.FunctionDef, kept: list[cst.Param]) -> cst.FunctionDef:
    new = cst.parse_statement('def f(self, *, vllm_config: VllmConfig, prefix: str = ""): pass')
    assert isinstance(new, cst.FunctionDef)
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    params = node.params.with_changes(
        params=[p.with_changes(comma=comma) for p in kept],
        star_arg=new.params.star_arg,
        kwonly_params=[*node.params.kwonly_params, *new.params.kwonly_params],
    )
    return node.with_changes(params=params)


def _with_config(node: cst.FunctionDef) -> cst.FunctionDef:
    """vLLM gives the entry nothing but its configuration."""
    lines = list(node.body.body)
    after = next((i + 1 for i, s in enumerate(lines) if edit.code(s) == "super().__init__()"), 0)
    first = after if not any("config" in edit.names_read(s) for s in lines[:after]) else 0
    known = "self.config = " in edit.code(node)
    lines[after:after] = [] if known else [edit.statement("self.config = config")]
    lines[first:first] = edit.block(_CONFIG)
    return node.with_changes(body=node.body.with_changes(body=lines))


def _reads(node: cst.CSTNode, name: str) -> bool:
    return name in edit.names_read(node)
