"""Drop parameters that nothing reads, at the definition and at every call."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import CallRecord, Facts
from porter.analyze.values import Scalar, Value
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged
from porter.passes.drop_dead_code import live_at_entry

# The engine passes these to the entry and builds it with these, whether or not it reads them.
ENTRY_ARGUMENTS = (
    "self",
    "input_ids",
    "positions",
    "position_ids",
    "kv_caches",
    "attn_metadata",
    "config",
    "linear_method",
    "hidden_states",
    "logits",
    "sampling_metadata",
    "weights",
)


_BEFORE = """\
from torch import nn


class OakMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, scores=None, **kwargs):
        return self.proj(hidden_states)


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mlp = OakMLP(config)

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        return self.mlp(hidden_states, scores=hidden_states.mean())
"""
_AFTER = _BEFORE.replace(
    "def forward(self, hidden_states, scores=None, **kwargs):",
    "def forward(self, hidden_states):",
).replace(
    "return self.mlp(hidden_states, scores=hidden_states.mean())",
    "return self.mlp(hidden_states)",
)
_UNCHANGED = """\
from torch import nn


class OakNorm(nn.Module):
    def __init__(self, config, eps=1e-6):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=eps)

    def forward(self, hidden_states):
        return self.norm(hidden_states)


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = OakNorm(config)

    def forward(self, input_ids):
        return self.norm(self.embed(input_ids))
"""


class DropArguments(Pass):
    """A parameter that no reached code reads, or that always has one known value, only makes the reader wonder."""

    stage = Stage.STRIP
    reason = "nothing reads the argument at inference"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (Unchanged(_UNCHANGED, "a number that __init__ is told keeps its name"),)

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        dropped: dict[cst.FunctionDef, set[str]] = {}
        for function in facts.called:
            edits.update(_constants(facts, function))
        if edits:
            return edit.rewrite(facts.program.tree, edits)
        for function in facts.called:
            if edit.parent(facts.program.tree, function) is not None:  # a lambda keeps what it takes
                dropped[function] = _unused(facts, function)
        sites = _sites(facts)
        while _agree(sites, dropped):
            pass
        edits.update({function: _definition(names) for function, names in dropped.items() if names})
        edits.update(_calls(sites, dropped))
        return edit.rewrite(facts.program.tree, edits)


def _all_params(function: cst.FunctionDef) -> list[cst.Param]:
    return edit.params_of(function)


def _unused(facts: Facts, function: cst.FunctionDef) -> set[str]:
    """Parameters, `*args` and `**kwargs` included, that the body never reads."""
    read = live_at_entry(facts, function)
    params = _all_params(function)
    keep: set[str] = {"self", "cls", "ctx"}
    is_entry = any(r.site is None for r in facts.calls_of(function))
    if is_entry:
        keep |= set(ENTRY_ARGUMENTS) - ({"position_ids"} if facts.program.counts_positions else set())
    found = {p.name.value for p in params} - read - keep
    for star in (function.params.star_arg, function.params.star_kwarg):
        if isinstance(star, cst.Param) and star.name.value not in read:
            found.add(f"*{star.name.value}")
    return found


def _definition(names: set[str]) -> edit.Edit:
    def change(updated: cst.FunctionDef) -> cst.FunctionDef:
        p = updated.params
        kept = [x for x in p.params if x.name.value not in names]
        if kept and len(kept) != len(p.params):
            kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        star = p.star_arg
        kwonly = [x for x in p.kwonly_params if x.name.value not in names]
        if isinstance(star, cst.Param) and f"*{star.name.value}" in names:
            star = cst.ParamStar() if kwonly else cst.MaybeSentinel.DEFAULT
        if isinstance(star, cst.ParamStar) and not kwonly:
            star = cst.MaybeSentinel.DEFAULT
        kwargs = p.star_kwarg
        if kwargs is not None and f"*{kwargs.name.value}" in names:
            kwargs = None
        if kwonly and kwargs is None:
            kwonly[-1] = kwonly[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return updated.with_changes(
            params=p.with_changes(params=kept, star_arg=star, kwonly_params=kwonly, star_kwarg=kwargs)
        )

    return change


def _sites(facts: Facts) -> dict[cst.Call, list[CallRecord]]:
    """The calls made at each place: one place may call several functions."""
    found: dict[cst.Call, list[CallRecord]] = {}
    for world in facts.worlds:
        for record in world.calls:
            if isinstance(record.site, cst.Call):
                found.setdefault(record.site, []).append(record)
    return found


def _agree(sites: dict[cst.Call, list[CallRecord]], dropped: dict[cst.FunctionDef, set[str]]) -> bool:
    """Keep a parameter whose argument another function called at the same place needs; whether that changed any."""
    changed = False
    for site, records in sites.items():
        if len({r.function.node for r in records}) < 2:
            continue
        common = set.intersection(*[_gone(site, r, dropped.get(r.function.node, set())) for r in records])
        for record in records:
            names = dropped.get(record.function.node, set())
            always = _gone(site, record, set())
            kept = {n for n in names if _gone(site, record, {n}) - always - common}
            names -= kept
            changed |= bool(kept)
    return changed


def _calls(
    sites: dict[cst.Call, list[CallRecord]], dropped: dict[cst.FunctionDef, set[str]]
) -> dict[cst.CSTNode, edit.Edit]:
    """At each call: drop the arguments whose parameter goes, and `**kwargs` that reaches nothing."""
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for site, records in sites.items():
        drop = set.intersection(*[_gone(site, r, dropped.get(r.function.node, set())) for r in records])
        if drop:
            edits[site] = _without(sorted(drop))
    return edits


def _without(drop: list[int]) -> edit.Edit:
    return lambda updated: edit.without_arguments(updated, drop)


def _gone(site: cst.Call, record: CallRecord, names: set[str]) -> set[int]:
    """Positions of the arguments at a call that bind a dropped parameter."""
    function = record.function.node
    params = [p.name.value for p in (*function.params.posonly_params, *function.params.params)]
    if (params and params[0] in ("self", "cls", "ctx") and record.receiver is not None) or (
        params and params[0] == "ctx"
    ):
        params = params[1:]
    drop: set[int] = set()
    position = 0
    takes_kwargs = function.params.star_kwarg is not None and f"*{function.params.star_kwarg.name.value}" not in names
    known = {p.name.value for p in _all_params(function)}
    for i, arg in enumerate(site.args):
        if arg.star == "**":
            if not takes_kwargs:
                drop.add(i)
        elif arg.star == "*":
            position = len(params)
        elif arg.keyword is not None:
            name = arg.keyword.value
            if name in names or (name not in known and not takes_kwargs):
                drop.add(i)
        else:
            if (position < len(params) and params[position] in names) or (
                position >= len(params) and not isinstance(function.params.star_arg, cst.Param)
            ):
                drop.add(i)
            position += 1
    return drop


# -- parameters with one known value ---------------------------------------------------------------


def _constants(facts: Facts, function: cst.FunctionDef) -> dict[cst.CSTNode, edit.Edit]:
    """Write the value of a parameter that is the same plain constant in every call where it is read."""
    records = facts.calls_of(function)
    edits: dict[cst.CSTNode, edit.Edit] = {}
    if function.name.value == "__init__" and all(r.site is None for r in records):
        return {}
    for param in _all_params(function):
        name = param.name.value
        values = [r.bound[name] for r in records if name in r.bound]
        text = _same_constant(values)
        if text is None or _is_bound(function, name):
            continue
        if function.name.value == "__init__" and text not in ("None", "True", "False"):
            continue
        for node in edit.walk(function.body):
            if isinstance(node, cst.Name) and node.value == name and _is_known(facts.values(node)):
                edits[node] = edit.replace(text)
    return edits


def _is_known(values: list[Value]) -> bool:
    return bool(values) and all(isinstance(v, Scalar) and v.known for v in values)


def _is_bound(function: cst.FunctionDef, name: str) -> bool:
    return any(
        isinstance(t, cst.Name) and t.value == name
        for n in edit.walk(function.body)
        if isinstance(n, cst.Assign | cst.AnnAssign | cst.AugAssign)
        for t in edit.targets(n)
    )


def _same_constant(values: list[Value]) -> str | None:
    if not values or not all(isinstance(v, Scalar) and v.known for v in values):
        return None
    found = {repr(v.const) for v in values if isinstance(v, Scalar)}
    if len(found) != 1 or not isinstance(values[0], Scalar):
        return None
    return found.pop() if isinstance(values[0].const, bool | int | float | type(None)) else None
