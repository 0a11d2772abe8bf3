"""Use the runtime's inverse frequencies where a rotary module of the file stays in the port."""

from __future__ import annotations

import libcst as cst
import numpy as np

from porter.analyze import scalars
from porter.analyze.evaluate import Evaluator
from porter.analyze.facts import Facts, line_of
from porter.analyze.point import Point, Unevaluable
from porter.analyze.values import Scalar, Sequence, Tensor, Value
from porter.errors import Refusal
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

ROPE = "porter.runtime.layers.rope"
TABLE = "transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS"

_BEFORE = """\
import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn = self.plain_frequencies
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.scale = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)

    @staticmethod
    def plain_frequencies(config):
        dim = config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)), 1.0

    def forward(self, input_ids, positions):
        angles = positions[..., None].float() * self.inv_freq
        return self.embed(input_ids) * torch.cat((angles, angles), dim=-1).cos() * self.scale
"""
_AFTER = _BEFORE.replace(
    """\
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
""",
    """\
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from porter.runtime.layers.rope import rope_init
""",
).replace(
    "rope_init_fn(config)\n",
    "rope_init(config.rope_parameters, config.head_dim, config.max_position_embeddings)\n",
)
_UNCHANGED = _BEFORE.replace(
    """\
        rope_init_fn = self.plain_frequencies
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.scale = rope_init_fn(config)
""",
    """\
        inv_freq, self.scale = self.plain_frequencies(config)
""",
)


class UseRopeInit(Pass):
    """A file picks a function for the kind of RoPE scaling; the runtime has one for all kinds."""

    stage = Stage.FUSE
    flat = True
    reason = "the runtime computes the same frequencies for every kind of RoPE"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (Unchanged(_UNCHANGED, "only one formula is used: it is the file's own"),)

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for function in facts.called:
            chosen = _chosen(facts, function)
            for node in edit.walk(function.body):
                if isinstance(node, cst.Call) and edit.code(node.func) in chosen:
                    edits[node] = edit.replace(_call(facts, node, function))
        tree = edit.rewrite(facts.program.tree, edits)
        names = {"rope_init"} | ({"get_rope_parameters"} if "get_rope_parameters(" in tree.code else set())
        return edit.add_imports(tree, {ROPE: names}) if edits else tree


def _chosen(facts: Facts, function: cst.FunctionDef) -> set[str]:
    """What a function calls an item of transformers' table of RoPE functions."""
    found: set[str] = set()
    for node in edit.walk(function.body):
        if isinstance(node, cst.Assign) and any(_is_table(facts, n) for n in edit.walk(node.value)):
            found |= {edit.code(t) for t in edit.targets(node)}
        if isinstance(node, cst.Call) and any(_is_table(facts, n) for n in edit.walk(node.func)):
            found.add(edit.code(node.func))
    return found


def _is_table(facts: Facts, node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Name) and facts.program.imports.get(node.value) == TABLE


def _call(facts: Facts, node: cst.Call, function: cst.FunctionDef) -> str:
    dims = {_rotary_dim(facts, node, value) for value in facts.values(node)}
    if len(dims) != 1 or "config" not in {p.name.value for p in edit.params_of(function)}:
        raise _refusal(facts, node, "how much of a head it rotates is not the same for all layers")
    reads = "rope_parameters" in facts.program.tree.code
    parameters = "config.rope_parameters" if reads else "get_rope_parameters(config)"
    return f"rope_init({parameters}, {dims.pop()}, config.max_position_embeddings)"


def _rotary_dim(facts: Facts, node: cst.Call, value: Value) -> str:
    """The number of rotated dims as source, after checking that the plain frequencies are the standard ones."""
    table = value.items[0] if isinstance(value, Sequence) and value.items else None
    if not isinstance(table, Tensor):
        raise _refusal(facts, node, "it does not return frequencies and a scale")
    if table.op == "rope_init":
        return scalars.text(table.args[1])
    dims = [v.args[1] for v in table.walk() if v.op == "arange" and len(v.args) > 2 and isinstance(v.args[1], Scalar)]
    if len(dims) != 1 or not _is_standard(table, dims[0]):
        raise _refusal(facts, node, "its plain frequencies are not theta ** (-2i / dim)")
    return scalars.text(dims[0])


def _is_standard(table: Tensor, dim: Value) -> bool:
    for theta in (10000.0, 500.0):
        e = Evaluator(Point(theta=theta))
        try:
            found, size = np.asarray(e(table), dtype=float), int(e(dim))
        except Unevaluable:
            return False
        expected = theta ** (-np.arange(0, size, 2) / size)
        if found.shape != expected.shape or not np.allclose(found, expected):
            return False
    return True


def _refusal(facts: Facts, node: cst.Call, why: str) -> Refusal:
    return Refusal(
        "",
        line_of(facts.program.tree, node),
        edit.code(node),
        why,
        "compute the frequencies with porter.runtime.layers.rope.rope_init",
        "P300",
    )
