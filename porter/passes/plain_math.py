"""Write numpy's functions of Python numbers as those of math."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.analyze.scalars import MATH
from porter.analyze.values import External, Scalar
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

_BEFORE = """\
import numpy as np
import torch
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.hidden_size = config.hidden_size

    def forward(self, input_ids):
        return self.embed(input_ids) * np.sqrt(self.hidden_size)
"""
_AFTER = (
    _BEFORE.replace("import torch\n", "import torch\n", 1)
    .replace("np.sqrt(", "math.sqrt(")
    .replace("from torch import nn\n", "from torch import nn\nimport math\n")
)
_UNCHANGED = _BEFORE.replace("np.sqrt(self.hidden_size)", "torch.sqrt(self.embed.weight).mean()")


class PlainMath(Pass):
    """A port does not need numpy for the square root of a number."""

    stage = Stage.STRIP
    reason = "math has the same function, and ports do without numpy"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (Unchanged(_UNCHANGED, "it is a function of tensors"),)

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for function in facts.called:
            for node in edit.walk(function.body):
                name = _function(facts, node) if isinstance(node, cst.Call) else ""
                if name:
                    edits[node] = _renamed(f"math.{name}")
        tree = edit.rewrite(facts.program.tree, edits)
        return edit.add_import(tree, "math") if edits else tree


def _renamed(name: str) -> edit.Edit:
    return lambda updated: updated.with_changes(func=edit.parse(name))


def _function(facts: Facts, node: cst.Call) -> str:
    """The function of math that a call of numpy's with plain numbers is."""
    names = {v.name for v in facts.values(node.func) if isinstance(v, External)}
    module, _, short = names.pop().rpartition(".") if len(names) == 1 else ("", "", "")
    values = [v for arg in node.args for v in facts.values(arg.value)]
    plain = bool(values) and all(isinstance(v, Scalar) for v in values)
    return short if module == "numpy" and short in MATH and plain else ""
