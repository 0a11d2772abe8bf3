"""Let forward return hidden states and compute_logits make logits of the rows that the sampler needs."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts, line_of
from porter.analyze.values import Instance, Layer, Value
from porter.errors import Refusal
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage

HIDDEN = "hidden_states"


_BEFORE = """\
import torch
from torch import nn
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, bias=False)

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        logits = self.lm_head(hidden_states)
        return logits * 0.5
"""
_AFTER = _BEFORE.replace(
    """\
        hidden_states = self.embed(input_ids)
""",
    (
        "        hidden_states = self.embed(input_ids)\n"
        "        return hidden_states\n"
        "    \n"
        "    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:\n"
    ),
)


class SplitLogits(Pass):
    """The engine computes logits for the last token of each sequence only, after the forward."""

    stage = Stage.FUSE
    flat = True
    reason = "logits are computed for the sampled rows only"
    EXAMPLES = (Example(_BEFORE, _AFTER),)

    def apply(self, facts: Facts) -> cst.Module:
        tree = facts.program.tree
        if facts.program.method(facts.entry, "compute_logits") is not None:
            return tree
        forward = facts.program.method(facts.entry, "forward")
        assert forward is not None
        head = _head_call(facts, forward.node)
        if head is None:
            raise Refusal(
                "",
                line_of(tree, facts.entry.node),
                facts.entry.name,
                "its forward does not end in a head over the vocabulary",
                "port ForCausalLM classes only",
                "P111",
            )
        line = edit.enclosing(tree, head, cst.SimpleStatementLine)
        body = list(forward.node.body.body)
        if line not in body:
            raise Refusal(
                "",
                line_of(tree, head),
                edit.code(head),
                "the head is applied under a condition",
                "apply it unconditionally",
                "P111",
            )
        place = body.index(line)
        source = head.args[0].value
        before = [*body[:place], edit.statement(f"return {edit.code(source)}")]
        after = [_with_hidden(s, head) for s in body[place:]]
        method = _compute_logits(after)
        return edit.rewrite(
            tree,
            {
                forward.node: lambda updated: cst.FlattenSentinel(
                    [updated.with_changes(body=updated.body.with_changes(body=before), returns=None), method]
                )
            },
        )


def _head_call(facts: Facts, forward: cst.FunctionDef) -> cst.Call | None:
    """The call that gives logits: of the head itself, or of a module of the file that ends in it."""
    for node in edit.walk(forward.body):
        if isinstance(node, cst.Call) and node.args:
            layers = [v for v in facts.values(node.func) if isinstance(v, Layer)]
            if layers and all(_is_head(v) for v in layers):
                return node
            results = [c.result for c in facts.calls_at(node) if isinstance(c.receiver, Instance)]
            if results and all(r is not None and _ends_in_head(r) for r in results):
                return node
    return None


def _is_head(layer: object) -> bool:
    return isinstance(layer, Layer) and layer.attrs.get("class") == "ParallelLMHead"


def _ends_in_head(result: Value) -> bool:
    return any(_is_head(v.attrs.get("layer")) for v in result.walk(frozenset({"linear"})))


class _Replace(cst.CSTTransformer):
    def __init__(self, head: cst.Call) -> None:
        super().__init__()
        self.head = head

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if original_node is self.head:
            return updated_node.with_changes(args=[cst.Arg(cst.Name(HIDDEN))])
        return updated_node


def _with_hidden(statement: cst.CSTNode, head: cst.Call) -> cst.BaseStatement:
    changed = statement.visit(_Replace(head))
    assert isinstance(changed, cst.BaseStatement)
    return changed


def _compute_logits(body: list[cst.BaseStatement]) -> cst.FunctionDef:
    node = cst.parse_statement(f"def compute_logits(self, {HIDDEN}: torch.Tensor) -> torch.Tensor:\n    pass\n")
    assert isinstance(node, cst.FunctionDef)
    if body and isinstance(body[0], cst.SimpleStatementLine):
        body[0] = body[0].with_changes(
            leading_lines=[x for x in body[0].leading_lines if x.comment is not None and "loss" not in x.comment.value]
        )
    return node.with_changes(body=node.body.with_changes(body=body), leading_lines=[cst.EmptyLine()])
