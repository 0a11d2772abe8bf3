"""Give the model vLLM's interface: inputs that may be embedded already, its weights by name, what it supports."""

from __future__ import annotations

import libcst as cst

from porter.analyze.program import ClassInfo, Program
from porter.analyze.weights import Rules
from porter.errors import Refusal
from porter.passes import edit
from porter.passes.base import Example
from porter.spec import ModelSpec
from porter.targets.base import TargetPass
from porter.targets.vllm.split_stages import MAKER
from porter.targets.vllm.weight_map import class_lines

_EMBEDS = "inputs_embeds"
_IMPORTS = {
    "collections.abc": ["Iterable"],
    "vllm.compilation.decorators": ["support_torch_compile"],
    "vllm.model_executor.models.interfaces": ["SupportsLoRA"],
    "vllm.model_executor.models.utils": ["WeightsMapper"],
    "vllm.sequence": ["IntermediateTensors"],
    ".support": ["load_weights"],
}

_EMBED = """\
def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
    return self.{embedding}(input_ids)
"""
_BEFORE = """\
import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


class OakModel(nn.Module):
    def __init__(self, config, *, vllm_config, prefix):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)


class OakForCausalLM(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model = OakModel(config, vllm_config=vllm_config, prefix=prefix)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, positions)
"""
_AFTER = """\
import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from .support import load_weights
from collections.abc import Iterable
from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import WeightsMapper
from vllm.sequence import IntermediateTensors


@support_torch_compile
class OakModel(nn.Module):
    def __init__(self, config, *, vllm_config, prefix):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, \
inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        return (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)


class OakForCausalLM(nn.Module, SupportsLoRA):
    hf_to_vllm_mapper = WeightsMapper()
    packed_modules_mapping = {}
    embedding_modules = {"embed_tokens": "input_embeddings"}

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model = OakModel(config, vllm_config=vllm_config, prefix=prefix)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, \
intermediate_tensors: IntermediateTensors | None = None, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids, positions, inputs_embeds=inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.hf_to_vllm_mapper, self.packed_modules_mapping)
"""


def _staged(text: str) -> str:
    """An example whose layers are dealt to pipeline stages."""
    line = "        self.model = OakModel(config, vllm_config=vllm_config, prefix=prefix)\n"
    made = line + "        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors\n"
    return text.replace(line, made).replace("SupportsLoRA", "SupportsLoRA, SupportsPP")


class WriteEntry(TargetPass):
    """vLLM asks every model for its embeddings, its logits and the loading of its weights."""

    reason = "this is the interface of vLLM's models"
    SPEC = ModelSpec("OakForCausalLM", embedding="model.embed_tokens", weights=Rules())
    EXAMPLES = (Example(_BEFORE, _AFTER), Example(_staged(_BEFORE), _staged(_AFTER)))

    def apply(self, tree: cst.Module, spec: ModelSpec) -> cst.Module:
        program = Program.read(tree)
        entry = program.classes.get(spec.architecture)
        if entry is None or "load_weights" in entry.methods:
            return tree
        made = _Made(program)
        embedding = program.classes and spec.embedding
        edits = _embedded(program, made)
        inner = made.inner(entry, program)
        if inner is not None:
            edits[inner.node] = _compiled
        edits[entry.node] = lambda updated: _entry(updated, spec, str(embedding))
        supports = ["SupportsLoRA", "SupportsPP"] if MAKER in tree.code else ["SupportsLoRA"]
        imports = {**_IMPORTS, "vllm.model_executor.models.interfaces": supports}
        imports = {m: n for m, n in imports.items() if inner is not None or m != "vllm.compilation.decorators"}
        return edit.add_imports(edit.rewrite(tree, edits), imports)


class _Made:
    """Which class each attribute of each class is made of."""

    def __init__(self, program: Program) -> None:
        self.of: dict[tuple[str, str], str] = {}
        for cls in program.classes.values():
            for owner in reversed(program.mro(cls)):
                init = owner.methods.get("__init__")
                for node in edit.walk(init.node) if init is not None else ():
                    if isinstance(node, cst.Assign) and isinstance(node.value, cst.Call):
                        target = edit.code(node.targets[0].target)
                        self.of[cls.name, target.removeprefix("self.")] = edit.code(node.value.func)

    def inner(self, entry: ClassInfo, program: Program) -> ClassInfo | None:
        """The class that the entry's forward gives the tokens: what vLLM compiles."""
        forward = program.method(entry, "forward")
        for call in _calls_with_ids(forward.node) if forward is not None else ():
            owner = entry.name
            for attribute in edit.code(call.func).split(".")[1:]:
                owner = self.of.get((owner, attribute), "")
            if owner in program.classes:
                return program.classes[owner]
        return None

    def is_embedding(self, program: Program, cls: ClassInfo, call: cst.Call) -> bool:
        """Whether a call of a class's method looks tokens up."""
        name = self.of.get((cls.name, edit.code(call.func).removeprefix("self.")), "")
        return name == "VocabParallelEmbedding" or _is_table(program, name)


def _is_table(program: Program, name: str) -> bool:
    info = program.classes.get(name)
    return info is not None and any("VocabParallelEmbedding" in c.bases for c in program.mro(info))


def _calls_with_ids(function: cst.FunctionDef) -> list[cst.Call]:
    return [
        n
        for n in edit.walk(function.body)
        if isinstance(n, cst.Call) and any(edit.code(a.value) == "input_ids" for a in n.args)
    ]


def _embedded(program: Program, made: _Made) -> dict[cst.CSTNode, edit.Edit]:
    """Every method on the way from the entry to the embedding takes inputs that are embedded already."""
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for cls in program.classes.values():
        forward = cls.methods.get("forward")
        if forward is None or _is_table(program, cls.name) or "input_ids" not in _names(forward.node):
            continue
        for call in _calls_with_ids(forward.node):
            if made.is_embedding(program, cls, call):
                edits[call] = lambda updated: edit.parse(f"({edit.code(updated)} if {_EMBEDS} is None else {_EMBEDS})")
            elif edit.code(call.func).startswith("self."):
                edits[call] = _with_embeds
        edits[forward.node] = _taking_embeds
    return edits


def _names(function: cst.FunctionDef) -> list[str]:
    return [p.name.value for p in edit.params_of(function)]


def _with_embeds(updated: cst.Call) -> cst.Call:
    new = edit.parse(f"f({_EMBEDS}={_EMBEDS})")
    assert isinstance(new, cst.Call)
    args = [a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in updated.args]
    return updated.with_changes(args=[*args, *new.args])


def _with_params(function: cst.FunctionDef, text: str) -> cst.FunctionDef:
    new = cst.parse_statement(f"def f({text}): pass")
    assert isinstance(new, cst.FunctionDef)
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    params = [p.with_changes(comma=comma) for p in function.params.params]
    return function.with_changes(params=function.params.with_changes(params=[*params, *new.params.params]))


def _taking_embeds(updated: cst.FunctionDef) -> cst.FunctionDef:
    return _with_params(updated, f"{_EMBEDS}: torch.Tensor | None = None")


def _compiled(updated: cst.ClassDef) -> cst.ClassDef:
    decorator = cst.Decorator(cst.Name("support_torch_compile"), leading_lines=updated.leading_lines)
    return updated.with_changes(decorators=[decorator, *updated.decorators], leading_lines=[])


# -- the entry class -------------------------------------------------------------------------------


def _entry(node: cst.ClassDef, spec: ModelSpec, embedding: str) -> cst.ClassDef:
    body = [_interface(s) if isinstance(s, cst.FunctionDef) else s for s in node.body.body]
    place = 1 if body and edit.code(body[0])[:3] in ('"""', "'''") else 0
    methods = {s.name.value: i for i, s in enumerate(body) if isinstance(s, cst.FunctionDef)}
    first = methods.get("forward", len(body))
    body[first:first] = edit.block(_EMBED.format(embedding=embedding))
    body[place:place] = edit.block(class_lines(spec))
    body += edit.block(
        "\ndef load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:\n"
        f"    return load_weights({_loading(spec)})\n"
    )
    names = ["SupportsLoRA", *(["SupportsPP"] if MAKER in edit.code(node) else [])]
    body = [_spaced(s) if isinstance(s, cst.FunctionDef) else s for s in body]
    bases = [b.with_changes(comma=cst.MaybeSentinel.DEFAULT) for b in node.bases]
    return node.with_changes(
        bases=[*bases, *(cst.Arg(cst.Name(name)) for name in names)], body=node.body.with_changes(body=body)
    )


def _spaced(function: cst.FunctionDef) -> cst.FunctionDef:
    return function if function.leading_lines else function.with_changes(leading_lines=[cst.EmptyLine(indent=False)])


def _loading(spec: ModelSpec) -> str:
    rules = spec.weights
    for name in (name for name, layout in rules.fused.items() if layout not in ("contiguous", "grouped")):
        raise Refusal("", 0, name, "vLLM's loader splits no such layout of q, k and v", "use the native target")
    grouped = tuple(sorted(name for name, layout in rules.fused.items() if layout == "grouped"))
    extra = [f"{k}={v!r}" for k, v in (("transposed", rules.transposed), ("grouped", grouped)) if v]
    return ", ".join(["self", "weights", "self.hf_to_vllm_mapper", "self.packed_modules_mapping", *extra])


def _interface(function: cst.FunctionDef) -> cst.FunctionDef:
    """forward with the parameters that vLLM passes, in its order."""
    if function.name.value != "forward":
        return function
    params = [p for p in function.params.params if p.name.value != _EMBEDS]
    kept = function.with_changes(params=function.params.with_changes(params=params))
    return _with_params(
        kept, f"intermediate_tensors: IntermediateTensors | None = None, {_EMBEDS}: torch.Tensor | None = None"
    )
