"""Let vLLM's LogitsProcessor apply the head, which in vLLM only holds the weight, and tie it as the config says."""

from __future__ import annotations

import libcst as cst

from porter.analyze.weights import Rules
from porter.passes import edit
from porter.passes.base import Example
from porter.spec import ModelSpec
from porter.targets.base import TargetPass
from porter.targets.vllm.imports import LAYERS

PROCESSOR = "logits_processor"

_BEFORE = """\
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead


class OakForCausalLM(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.model = OakModel(config, vllm_config=vllm_config, prefix=prefix)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, bias=True)

    def compute_logits(self, hidden_states):
        return self.lm_head(hidden_states) * 0.5
"""
_AFTER = """\
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.layers.logits_processor import LogitsProcessor


class OakForCausalLM(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.model = OakModel(config, vllm_config=vllm_config, prefix=prefix)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, bias=True)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)

    def compute_logits(self, hidden_states):
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias) * 0.5
"""


class ProcessLogits(TargetPass):
    """vLLM gathers logits from all ranks in a layer of its own."""

    reason = "vLLM's head holds a weight; its logits processor computes the logits"
    SPEC = ModelSpec("OakForCausalLM", weights=Rules(tied={"lm_head.weight": "model.embed_tokens.weight"}))
    EXAMPLES = (Example(_BEFORE, _AFTER),)

    def apply(self, tree: cst.Module, spec: ModelSpec) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for node in edit.walk(tree):
            if isinstance(node, cst.ClassDef) and PROCESSOR not in edit.code(node):
                edits.update(_process(node))
        if not edits:
            return tree
        edits.update(_tie(tree, spec, edits))
        imports = {f"{LAYERS}.logits_processor": ["LogitsProcessor"]}
        return edit.add_imports(edit.rewrite(tree, edits), imports)


def _process(node: cst.ClassDef) -> dict[cst.CSTNode, edit.Edit]:
    """Where a class makes a head, its processor; where it calls the head, the processor's call."""
    edits: dict[cst.CSTNode, edit.Edit] = {}
    biased: dict[str, bool] = {}
    for line in (n for n in edit.walk(node) if isinstance(n, cst.SimpleStatementLine)):
        calls = [n for n in edit.walk(line) if isinstance(n, cst.Call)]
        call = next((c for c in calls if edit.code(c.func) == "ParallelLMHead"), None)
        made = line.body[0]
        if call is not None and isinstance(made, cst.Assign):
            biased[edit.code(made.targets[0].target)] = _has_bias(call)
            processor = edit.statement(f"self.{PROCESSOR} = LogitsProcessor({edit.code(call.args[0].value)})")
            edits[line] = _followed_by(processor)
    for call in (n for n in edit.walk(node) if isinstance(n, cst.Call)):
        head = edit.code(call.func)
        if head in biased:
            edits[call] = _processed(head, f", {head}.bias" if biased[head] else "")
    return edits


def _followed_by(statement: cst.SimpleStatementLine) -> edit.Edit:
    return lambda updated: cst.FlattenSentinel([updated, statement])


def _processed(head: str, bias: str) -> edit.Edit:
    return lambda updated: edit.parse(f"self.{PROCESSOR}({head}, {edit.code(updated.args[0].value)}{bias})")


def _has_bias(call: cst.Call) -> bool:
    texts = [edit.code(a.value) for a in call.args if a.keyword is not None and a.keyword.value == "bias"]
    return (texts or ["False"]) != ["False"]


def _tie(tree: cst.Module, spec: ModelSpec, edits: dict[cst.CSTNode, edit.Edit]) -> dict[cst.CSTNode, edit.Edit]:
    """The tie goes last in the entry's __init__, which has both made by then."""
    entry = next((n for n in tree.body if isinstance(n, cst.ClassDef) and n.name.value == spec.architecture), None)
    init = next((f for f in edit.functions(entry) if f.name.value == "__init__"), None) if entry is not None else None
    if init is None or not spec.weights.tied:
        return {}
    lines = "\n".join(
        f"if config.tie_word_embeddings:\n    self.{head} = self.{head}.tie_weights(self.{table})"
        for head, table in (map(_module, pair) for pair in spec.weights.tied.items())
    )
    return {init.body: lambda updated: updated.with_changes(body=[*updated.body, *edit.block(lines)])}


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")
