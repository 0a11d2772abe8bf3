"""Let vLLM deal the layers to pipeline stages, where one tensor is all that goes from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import libcst as cst

from porter.analyze.program import ClassInfo, Program
from porter.passes import edit
from porter.passes.base import Example, Unchanged
from porter.spec import ModelSpec
from porter.targets.base import TargetPass

MAKER = "make_empty_intermediate_tensors"
_IMPORTS = {
    "itertools": ["islice"],
    "vllm.distributed": ["get_pp_group"],
    "vllm.model_executor.models.utils": ["extract_layer_index", f"{MAKER}_factory", "make_layers"],
    "vllm.sequence": ["IntermediateTensors"],
}

_BEFORE = """\
import torch
from torch import nn


class OakModel(nn.Module):
    def __init__(self, config, *, vllm_config, prefix=""):
        super().__init__()
        self.layers = nn.ModuleList([OakLayer(config, i, vllm_config=vllm_config, prefix=f"{prefix}.layers.{i}") \
for i in range(config.num_layers)])

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embed_tokens(input_ids)
        angles = self.angles(positions)
        for layer in self.layers:
            hidden_states = layer(hidden_states, angles)
        return self.norm(hidden_states)


class OakForCausalLM(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.model = OakModel(vllm_config.model_config.hf_config, vllm_config=vllm_config, prefix="model")

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, positions)
"""
_AFTER = """\
import torch
from torch import nn
from itertools import islice
from vllm.distributed import get_pp_group
from vllm.model_executor.models.utils import extract_layer_index, make_empty_intermediate_tensors_factory, make_layers
from vllm.sequence import IntermediateTensors


class OakModel(nn.Module):
    def __init__(self, config, *, vllm_config, prefix=""):
        super().__init__()
        self.start_layer, self.end_layer, self.layers = make_layers(config.num_layers, \
lambda prefix: OakLayer(config, extract_layer_index(prefix), vllm_config=vllm_config, prefix=prefix), \
prefix=f"{prefix}.layers")
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(["hidden_states"], \
vllm_config.model_config.get_hidden_size())

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, \
intermediate_tensors: IntermediateTensors | None = None) -> torch.Tensor:
        angles = self.angles(positions)
        if intermediate_tensors is None:
            hidden_states = self.embed_tokens(input_ids)
        else:
            hidden_states = intermediate_tensors["hidden_states"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states = layer(hidden_states, angles)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        return self.norm(hidden_states)


class OakForCausalLM(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.model = OakModel(vllm_config.model_config.hf_config, vllm_config=vllm_config, prefix="model")
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, positions, intermediate_tensors=intermediate_tensors)
"""
_TOKENS = _BEFORE.replace("self.angles(positions)", "self.angles(input_ids)")
_TWO = _BEFORE.replace(
    "hidden_states = layer(hidden_states, angles)", "hidden_states, angles = layer(hidden_states, angles)"
)
_ROOT = _BEFORE.replace("return self.model(input_ids, positions)", "return self.model(input_ids, positions) * 2")


@dataclass(frozen=True)
class _Stages:
    """A forward whose layers can be dealt: what comes before, the loop, what comes after, and what goes through."""

    model: ClassInfo
    path: str  # from the entry to the model
    layers: str
    made: cst.Assign
    before: Sequence[cst.BaseStatement]
    loop: cst.For
    after: Sequence[cst.BaseStatement]
    carried: str


class SplitStages(TargetPass):
    """A stage runs its part of the layers, and hands the hidden states on; positions are known to all stages."""

    reason = "vLLM deals the layers to pipeline stages"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (
        Unchanged(_TWO, "two tensors go from layer to layer"),
        Unchanged(_TOKENS, "every layer needs the tokens, which later stages do not have"),
        Unchanged(_ROOT, "the entry computes something after the last stage"),
    )

    def apply(self, tree: cst.Module, spec: ModelSpec) -> cst.Module:
        program = Program.read(tree)
        entry = program.classes.get(spec.architecture)
        stages = _stages(program, entry) if entry is not None else None
        if entry is None or stages is None:
            return tree
        edits = {**_init(stages), **_forward(stages), **_handed_on(entry, stages)}
        return edit.add_imports(edit.rewrite(tree, edits), _IMPORTS)


def _stages(program: Program, entry: ClassInfo) -> _Stages | None:
    call = _only_call(entry)
    if call is None or "__init__" not in entry.methods:
        return None
    path = edit.code(call.func).removeprefix("self.")
    model: ClassInfo | None = entry
    for attribute in path.split("."):
        model = program.classes.get(_made_of(model, attribute)) if model is not None else None
    if model is None or model is entry or not {"__init__", "forward"} <= model.methods.keys():
        return None
    return _read(model, path)


def _only_call(entry: ClassInfo) -> cst.Call | None:
    """`return self.model(input_ids, positions)`, if that is all that the entry's forward does."""
    body = entry.methods["forward"].node.body.body if "forward" in entry.methods else ()
    line = body[0].body[0] if len(body) == 1 and isinstance(body[0], cst.SimpleStatementLine) else None
    call = line.value if isinstance(line, cst.Return) else None
    return call if isinstance(call, cst.Call) and "input_ids" in edit.names_read(call) else None


def _made_of(cls: ClassInfo, attribute: str) -> str:
    assigned = (n for n in edit.walk(cls.node) if isinstance(n, cst.Assign) and isinstance(n.value, cst.Call))
    for node in assigned:
        if edit.code(node.targets[0].target) == f"self.{attribute}" and isinstance(node.value, cst.Call):
            return edit.code(node.value.func)
    return ""


def _read(model: ClassInfo, path: str) -> _Stages | None:
    body = [s for s in model.methods["forward"].node.body.body if isinstance(s, cst.BaseStatement)]
    loops = [i for i, s in enumerate(body) if isinstance(s, cst.For)]
    if len(loops) != 1 or not isinstance(loop := body[loops[0]], cst.For):
        return None
    before, after = body[: loops[0]], body[loops[0] + 1 :]
    layers = edit.code(loop.iter).removeprefix("enumerate(").removesuffix(")").removeprefix("self.")
    made = next((n for n in edit.walk(model.node) if isinstance(n, cst.Assign) and _is_list(n, layers)), None)
    uses = sum(isinstance(n, cst.Attribute) and edit.code(n) == f"self.{layers}" for n in edit.walk(model.node))
    assigned = _assigned([loop.body]) - _assigned_names(loop.target)
    read_after = {n for s in after for n in edit.names_read(s)}
    known = _assigned(before)
    carried = {n for n in assigned if n in read_after or (n in known and n in edit.names_read(loop.body))}
    ends = bool(after) and isinstance(after[-1], cst.SimpleStatementLine) and isinstance(after[-1].body[0], cst.Return)
    if made is None or uses != 2 or len(carried) != 1 or not carried <= known or not ends:
        return None
    stages = _Stages(model, path, layers, made, before, loop, after, carried.pop())
    reads = {n for s in _shared(stages) for n in edit.names_read(s)}
    return None if reads & {stages.carried, "input_ids"} else stages


def _is_list(node: cst.Assign, layers: str) -> bool:
    """`self.layers = nn.ModuleList([Layer(..., prefix=...) for i in range(n)])`"""
    call = node.value
    if edit.code(node.targets[0].target) != f"self.{layers}" or not isinstance(call, cst.Call) or len(call.args) != 1:
        return False
    inner = call.args[0].value
    counted = isinstance(inner, cst.ListComp) and edit.code(inner.for_in.iter).startswith("range(")
    return edit.code(call.func) == "nn.ModuleList" and counted and isinstance(inner.elt, cst.Call)  # type: ignore[attr-defined]


def _assigned(nodes: Sequence[cst.CSTNode]) -> set[str]:
    smalls = [n for node in nodes for n in edit.walk(node)]
    return {name for small in smalls for t in edit.targets(small) for name in _assigned_names(t)}


def _assigned_names(target: cst.CSTNode) -> set[str]:
    return {n.value for t in edit.leaves(target) if isinstance(n := t, cst.Name)}  # type: ignore[arg-type]


def _init(stages: _Stages) -> dict[cst.CSTNode, edit.Edit]:
    comprehension = stages.made.value.args[0].value  # type: ignore[attr-defined]
    count = edit.code(comprehension.for_in.iter.args[0].value)
    layer = comprehension.elt.visit(_ByPrefix(edit.code(comprehension.for_in.target)))
    layers = stages.layers
    made = (
        f"self.start_layer, self.end_layer, self.{layers} = "
        f'make_layers({count}, lambda prefix: {edit.code(layer)}, prefix=f"{{prefix}}.{layers}")'
    )
    empty = f'self.{MAKER} = {MAKER}_factory(["{stages.carried}"], vllm_config.model_config.get_hidden_size())'
    init = stages.model.methods["__init__"].node
    line = next(s for s in edit.lines(init) if s.body[0] is stages.made)
    return {
        line: lambda updated: edit.statement(made).with_changes(leading_lines=updated.leading_lines),
        init.body: lambda updated: updated.with_changes(body=[*updated.body, edit.statement(empty)]),
    }


class _ByPrefix(cst.CSTTransformer):
    """A layer's construction from its prefix alone."""

    def __init__(self, counter: str) -> None:
        super().__init__()
        self.counter = counter

    def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
        named = original_node.keyword is not None and original_node.keyword.value == "prefix"
        return updated_node.with_changes(value=cst.Name("prefix")) if named else updated_node

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        return edit.parse("extract_layer_index(prefix)") if updated_node.value == self.counter else updated_node


def _forward(stages: _Stages) -> dict[cst.CSTNode, edit.Edit]:
    name = stages.carried
    shared = _shared(stages)
    first = [s for s in stages.before if s not in shared]
    start = cst.parse_statement(
        f'if intermediate_tensors is None:\n    pass\nelse:\n    {name} = intermediate_tensors["{name}"]\n'
    )
    assert isinstance(start, cst.If)
    start = start.with_changes(body=start.body.with_changes(body=first))
    last = edit.block(f'if not get_pp_group().is_last_rank:\n    return IntermediateTensors({{"{name}": {name}}})\n')
    part = f"islice(self.{stages.layers}, self.start_layer, self.end_layer)"
    counted = edit.code(stages.loop.iter).startswith("enumerate(")
    loop = stages.loop.with_changes(iter=edit.parse(f"enumerate({part}, self.start_layer)" if counted else part))
    body = [*shared, start, loop, *last, *stages.after]
    forward = stages.model.methods["forward"].node
    return {forward: lambda updated: _taking(updated.with_changes(body=updated.body.with_changes(body=body)))}


def _shared(stages: _Stages) -> list[cst.BaseStatement]:
    """What every stage computes for itself: what the layers or the end read besides the hidden states."""
    wanted = {n for s in (stages.loop, *stages.after) for n in edit.names_read(s)} - {stages.carried}
    while True:
        found = [s for s in stages.before if _assigned([s]) & wanted]
        more = wanted | ({n for s in found for n in edit.names_read(s)} & _assigned(stages.before))
        if more == wanted:
            return found
        wanted = more


def _taking(function: cst.FunctionDef) -> cst.FunctionDef:
    new = cst.parse_statement("def f(intermediate_tensors: IntermediateTensors | None = None): pass")
    assert isinstance(new, cst.FunctionDef)
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    params = [p.with_changes(comma=comma) for p in function.params.params]
    return function.with_changes(params=function.params.with_changes(params=[*params, *new.params.params]))


def _handed_on(entry: ClassInfo, stages: _Stages) -> dict[cst.CSTNode, edit.Edit]:
    call = _only_call(entry)
    assert call is not None
    line = edit.statement(f"self.{MAKER} = self.{stages.path}.{MAKER}")
    new = edit.parse("f(intermediate_tensors=intermediate_tensors)")
    assert isinstance(new, cst.Call)
    args = [a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in call.args]
    init = entry.methods["__init__"].node
    return {
        call: lambda updated: updated.with_changes(args=[*args, *new.args]),
        init.body: lambda updated: updated.with_changes(body=[*updated.body, line]),
    }
