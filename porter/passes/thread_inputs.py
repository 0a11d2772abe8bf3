"""Hand positions, each layer's cache and the attention metadata down from the entry to the attention layers."""

from __future__ import annotations

from collections.abc import Iterable

import libcst as cst

from porter.analyze.facts import CallRecord, Facts, line_of
from porter.errors import Refusal
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage
from porter.passes.parameters import EQUAL, positions_place, with_params

RUNTIME = ("positions", "kv_caches", "kv_cache", "attn_metadata")


_BEFORE = """\
from torch import nn


class OakAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.attn(hidden_states, kv_cache, attn_metadata)


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OakAttention(config) for _ in range(config.num_layers)])

    def forward(self, input_ids, positions, kv_caches, attn_metadata):
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states
"""


_AFTER = _BEFORE.replace(
    "def forward(self, hidden_states):",
    "def forward(self, hidden_states, kv_cache, attn_metadata):",
).replace(
    """\
        for layer in self.layers:
            hidden_states = layer(hidden_states)
""",
    """\
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, kv_caches[i], attn_metadata)
""",
)


class ThreadInputs(Pass):
    """What the attention layers need travels as plain arguments, named alike everywhere."""

    stage = Stage.ATTEND
    last = True  # positions have their name by then
    reason = "the attention layers need positions, their cache and the batch's metadata"
    EXAMPLES = (Example(_BEFORE, _AFTER),)

    def apply(self, facts: Facts) -> cst.Module:
        _one_cache_each(facts)
        edits: dict[cst.CSTNode, edit.Edit] = {}
        missing = {f: m for f in facts.called if (m := _missing(facts, f))}
        for function, names in missing.items():
            edits[function] = with_params(names)
            for record in facts.calls_of(function):
                if isinstance(record.site, cst.Call):
                    edits.update(_at_site(facts, record, names))
            if missing:
                break
        return edit.rewrite(facts.program.tree, edits)


def _one_cache_each(facts: Facts) -> None:
    """Refuse a layer that attends twice, or that runs twice in one turn of the loop: each needs a cache of its own."""
    for world in facts.worlds:
        needing = {
            c.function.node
            for c in world.calls
            if "kv_cache" in edit.names_read(c.function.node.body)
            or "kv_caches" in edit.names_read(c.function.node.body)
        }
        users: dict[cst.CSTNode, set[cst.CSTNode]] = {}
        for record in world.calls:
            if record.function.node in needing and isinstance(record.site, cst.Call):
                caller = edit.enclosing(facts.program.tree, record.site, cst.FunctionDef)
                users.setdefault(caller, set()).add(record.site)
        for node, values in world.values.items():
            if isinstance(node, cst.Call) and any(v.op == "paged_attention" and v.node is node for v in values):
                users.setdefault(edit.enclosing(facts.program.tree, node, cst.FunctionDef), set()).add(node)
        for caller, sites in users.items():
            if len(sites) > 1 and caller is not None:
                second = max(line_of(facts.program.tree, s) for s in sites)
                raise Refusal(
                    "",
                    second,
                    "a second attention in one layer",
                    "each attention needs a cache of its own, and a layer has one",
                    "give each attention its own layer",
                    "P202",
                )


def _missing(facts: Facts, function: cst.FunctionDef) -> list[str]:
    """Runtime inputs that a function reads without having them."""
    if function.name.value == "__init__":
        return []
    have = {p.name.value for p in edit.params_of(function)}
    for node in edit.walk(function.body):
        if isinstance(node, cst.Assign):
            have |= {t.value for t in edit.targets(node) if isinstance(t, cst.Name)}
    if any(r.site is None for r in facts.calls_of(function)) and function.name.value == "forward":
        return [n for n in ("positions", "kv_caches", "attn_metadata") if n not in have]
    read = edit.names_read(function.body)
    return [n for n in RUNTIME if n in read and n not in have]


def _at_site(facts: Facts, record: CallRecord, names: Iterable[str]) -> dict[cst.CSTNode, edit.Edit]:
    site = record.site
    assert isinstance(site, cst.Call)
    edits: dict[cst.CSTNode, edit.Edit] = {}
    loop = edit.enclosing(facts.program.tree, site, cst.For)
    values = dict.fromkeys(names, "")
    for name in values:
        values[name] = name
    if "kv_cache" in values and loop is not None:
        values["kv_cache"] = f"kv_caches[{_loop_index(loop, edits)}]"
    edits[site] = _with_args(record, values)
    return edits


def _loop_index(loop: cst.For, edits: dict[cst.CSTNode, edit.Edit]) -> str:
    """The number of the layer in a loop over layers; `enumerate` is added where the loop has none."""
    if isinstance(loop.iter, cst.Call) and edit.code(loop.iter.func) == "enumerate":
        target = loop.target
        assert isinstance(target, cst.Tuple)
        return edit.code(target.elements[0].value)
    if isinstance(loop.iter, cst.Call) and edit.code(loop.iter.func) == "range":
        return edit.code(loop.target)
    edits[loop.iter] = lambda updated: cst.Call(cst.Name("enumerate"), [cst.Arg(updated)])
    edits[loop.target] = lambda updated: cst.Tuple(
        [
            cst.Element(cst.Name("i")),
            cst.Element(edit.parenthesized(updated) if isinstance(updated, cst.Tuple) else updated),
        ],
        lpar=[],
        rpar=[],
    )
    return "i"


def _with_args(record: CallRecord, values: dict[str, str]) -> edit.Edit:
    """Add arguments to a call: positions first, the rest last; keywords become positional where the order allows."""
    params = [p.name.value for p in edit.params_of(record.function.node)]
    if record.receiver is not None and params and params[0] == "self":
        params = params[1:]

    def change(updated: cst.Call) -> cst.Call:
        args = [a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in updated.args]
        args = _positional(args, params)
        plain = all(a.keyword is None and not a.star for a in args)
        for name, value in values.items():
            arg = cst.Arg(edit.parse(value))
            if name == "positions" and all(a.keyword is None and not a.star for a in args[: positions_place(params)]):
                args.insert(positions_place(params), arg)
            elif plain:
                args.append(arg)
            else:
                args.append(cst.Arg(edit.parse(value), keyword=cst.Name(name), equal=EQUAL))
        return updated.with_changes(args=args, whitespace_before_args=cst.SimpleWhitespace(""))

    return change


def _positional(args: list[cst.Arg], params: list[str]) -> list[cst.Arg]:
    """Arguments by position if their keywords are the parameters from the first on."""
    named = {a.keyword.value: a for a in args if a.keyword is not None}
    bare = [a for a in args if a.keyword is None]
    if any(a.star for a in args):
        return args
    rest = params[len(bare) : len(bare) + len(named)]
    if set(rest) != set(named):
        return args
    clean = cst.SimpleWhitespace("")
    return [*[a.with_changes(whitespace_after_arg=clean) for a in bare], *[cst.Arg(named[n].value) for n in rest]]
