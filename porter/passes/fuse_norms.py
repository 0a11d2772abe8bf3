"""Use the runtime's RMSNorm for classes that compute exactly that, weight and rounding included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import libcst as cst
import numpy as np

from porter.analyze.evaluate import Evaluator
from porter.analyze.facts import CallRecord, Facts
from porter.analyze.point import Point, Unevaluable
from porter.analyze.poly import Poly
from porter.analyze.values import Instance, Scalar, Tensor, Value
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

NORM = "porter.runtime.layers.norm"
WIDTH, EPS = 8, 0.125


@dataclass(frozen=True)
class Norm:
    """How a class maps to RMSNorm: the parameters of its __init__ that are the width and eps, and the weight's form."""

    width: str
    eps: str
    literal: str  # eps where no parameter holds it
    unit_offset: bool


_BEFORE = """\
import torch
from torch import nn


class OakNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = OakNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, input_ids):
        return self.norm(self.embed(input_ids))
"""
_AFTER = _BEFORE.replace(
    """\
from torch import nn
""",
    """\
from torch import nn
from porter.runtime.layers.norm import RMSNorm
""",
).replace(
    "self.norm = OakNorm(config.hidden_size, eps=config.norm_eps)",
    "self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)",
)
_UNCHANGED_1 = _BEFORE.replace(
    "return self.weight * y.to(x.dtype)",
    "return (self.weight * y).to(x.dtype)",
)
_UNCHANGED_2 = _BEFORE.replace(
    """\
        y = x.float()
""",
    """\
        y = x.float()
        y = y - y.mean(-1, keepdim=True)
""",
)


class FuseNorms(Pass):
    """Checked on numbers, so that a norm with another weight or rounding stays as the file has it."""

    stage = Stage.FUSE
    flat = True
    reason = "the class computes exactly RMSNorm"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (
        Unchanged(_UNCHANGED_1, "the weight is applied before rounding, not after"),
        Unchanged(_UNCHANGED_2, "the mean is taken off first: this is a layer norm without bias"),
    )

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for name in sorted({n for w in facts.worlds for n in w.classes}):
            norm = _recognise(facts, name)
            if norm is not None:
                edits.update(_replace(facts, name, norm))
        tree = edit.rewrite(facts.program.tree, edits)
        return edit.add_imports(tree, {NORM: ["RMSNorm"]}) if edits else tree


def _recognise(facts: Facts, name: str) -> Norm | None:
    info = facts.program.classes[name]
    forward = facts.program.method(info, "forward")
    init = facts.program.method(info, "__init__")
    if forward is None or init is None or len(edit.params_of(forward.node)) != 2:
        return None
    found = {
        _of_record(facts, r, init.node)
        for r in facts.calls_of(forward.node)
        if isinstance(r.receiver, Instance) and r.receiver.cls is info
    }
    return found.pop() if len(found) == 1 else None


def _of_record(facts: Facts, record: CallRecord, init: cst.FunctionDef) -> Norm | None:
    instance, result = record.receiver, record.result
    weights = (
        [v for v in instance.attrs.values() if isinstance(v, Tensor) and v.op == "parameter"]
        if isinstance(instance, Instance)
        else []
    )
    source = next((v for k, v in record.bound.items() if k != "self" and isinstance(v, Tensor)), None)
    if len(weights) != 1 or source is None or not isinstance(result, Tensor):
        return None
    eps = [v for v in _inside(result, source, weights[0]) if isinstance(v, Scalar) and not v.known and v.op != "dtype"]
    form = _form(result, source, weights[0], eps)
    bound = next(
        (c.bound for w in facts.worlds for c in w.calls if c.function.node is init and c.bound.get("self") is instance),
        None,
    )
    if form is None or bound is None or weights[0].shape is None:
        return None
    width = _parameter_of(bound, weights[0].shape[0])
    inside = [v for v in _inside(result, source, weights[0]) if isinstance(v, Scalar)]
    epsilon = next((k for k, v in bound.items() if k != width and any(v is x for x in inside)), "")
    literal = next((repr(v.const) for v in inside if isinstance(v.const, float) and 0 < v.const < 0.01), "")
    if not width or not (epsilon or literal):
        return None
    return Norm(width, epsilon, literal, form == "offset")


def _inside(result: Value, *ends: Tensor) -> list[Value]:
    """What the class computes: everything between its input and its result."""
    seen: dict[int, Value] = {id(e): e for e in ends}
    todo: list[Value] = [result]
    while todo:
        value = todo.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            todo.extend(value.args)
    return list(seen.values())[len(ends) :]


def _parameter_of(bound: Mapping[str, Value], size: Poly) -> str:
    return next((k for k, v in bound.items() if isinstance(v, Scalar) and v.size == size), "")


def _form(result: Tensor, source: Tensor, weight: Tensor, eps: list[Scalar]) -> str | None:
    """plain, offset or None, by comparing numbers and where the result is rounded."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, WIDTH)), rng.standard_normal(WIDTH)
    e = Evaluator(Point())
    e.memo |= {id(source): x, id(weight): w} | {id(s): EPS for s in eps}
    try:
        found = np.asarray(e(result))
    except Unevaluable:
        return None
    values = (
        [EPS]
        if eps
        else [v.const for v in _inside(result, source, weight) if isinstance(v, Scalar) and isinstance(v.const, float)]
    )
    for epsilon in values:
        normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
        if found.shape == x.shape and np.allclose(found, normed * w, atol=1e-9) and _rounds_before_weight(result):
            return "plain"
        if found.shape == x.shape and np.allclose(found, normed * (1 + w), atol=1e-9) and _rounds_last(result):
            return "offset"
    return None


def _rounds_before_weight(result: Tensor) -> bool:
    return (
        result.op == "mul"
        and any(a.op == "parameter" for a in result.args)
        and any(a.op in ("to", "type_as", "type") for a in result.args)
    )


def _rounds_last(result: Tensor) -> bool:
    return result.op in ("to", "type_as", "type")


def _replace(facts: Facts, name: str, norm: Norm) -> dict[cst.CSTNode, edit.Edit]:
    """Every creation of the class as a creation of RMSNorm."""
    init = facts.program.method(facts.program.classes[name], "__init__")
    assert init is not None
    params = [p for p in edit.params_of(init.node) if p.name.value != "self"]
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for node in {r.site for r in facts.calls_of(init.node)}:
        if isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value == name:
            edits[node] = edit.replace(_creation(node, params, norm))
    return edits


def _creation(node: cst.Call, params: list[cst.Param], norm: Norm) -> str:
    given = {p.name.value: edit.code(p.default) for p in params if p.default is not None}
    names = [p.name.value for p in params]
    for i, arg in enumerate(node.args):
        given[arg.keyword.value if arg.keyword is not None else names[i]] = edit.code(arg.value)
    offset = ", unit_offset=True" if norm.unit_offset else ""
    eps = f", eps={given.get(norm.eps, norm.literal)}"
    return f"RMSNorm({given[norm.width]}{eps}{offset})"
