"""Hand positions, each layer's cache and the attention metadata down from the entry to the attention layers."""

from __future__ import annotations

from collections.abc import Iterable

import libcst as cst

from porter.analyze.evaluate import Evaluator
from porter.analyze.facts import CallRecord, Facts, line_of
from porter.analyze.point import Point, Unevaluable
from porter.analyze.values import Tensor, Value
from porter.errors import Refusal
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

LONG = 41  # a length at which positions that are cut off or wrap around show
RUNTIME = ("positions", "kv_caches", "kv_cache", "attn_metadata")


_POSITIONS_BEFORE = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, input_ids, position_ids=None):
        return self.embed(input_ids) + self.embed_positions(position_ids)
"""
_POSITIONS_AFTER = _POSITIONS_BEFORE.replace(
    """\
    def forward(self, input_ids, position_ids=None):
        return self.embed(input_ids) + self.embed_positions(position_ids)
""",
    """\
    def forward(self, input_ids, positions=None):
        return self.embed(input_ids) + self.embed_positions(positions)
""",
)
_POSITIONS_BEFORE_2 = """\
import torch
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, input_ids):
        places = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        return self.embed(input_ids) + self.embed_positions(places + 2)
"""
_POSITIONS_AFTER_2 = _POSITIONS_BEFORE_2.replace(
    "return self.embed(input_ids) + self.embed_positions(places + 2)",
    "return self.embed(input_ids) + self.embed_positions(positions + 2)",
)
_POSITIONS_UNCHANGED = _POSITIONS_BEFORE.replace(
    "self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)",
    "self.embed_types = nn.Embedding(config.vocab_size, config.hidden_size)",
).replace(
    """\
    def forward(self, input_ids, position_ids=None):
        return self.embed(input_ids) + self.embed_positions(position_ids)
""",
    """\
    def forward(self, input_ids, positions):
        return self.embed(input_ids) + self.embed_types(input_ids)
""",
)


class UsePositions(Pass):
    """Positions come from the engine, one for each token; nothing counts them from shapes or masks."""

    stage = Stage.ATTEND
    reason = "the engine gives each token's position"
    EXAMPLES = (Example(_POSITIONS_BEFORE, _POSITIONS_AFTER), Example(_POSITIONS_BEFORE_2, _POSITIONS_AFTER_2))
    UNCHANGED = (Unchanged(_POSITIONS_UNCHANGED, "these ids are no positions"),)

    def apply(self, facts: Facts) -> cst.Module:
        edits = _renames(facts)
        if not edits:
            edits = _computed(facts)
        return edit.rewrite(facts.program.tree, edits)


def _renames(facts: Facts) -> dict[cst.CSTNode, edit.Edit]:
    """Call the argument that holds the positions `positions` wherever it goes."""
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for function in facts.called:
        for param in edit.params_of(function):
            name = param.name.value
            bound = [r.bound[name] for r in facts.calls_of(function) if name in r.bound]
            if name == "positions" or not bound or not all(v.op == "positions" for v in bound):
                continue
            if any(p.name.value == "positions" for p in edit.params_of(function)) or name not in ("position_ids",):
                continue
            edits.update(_rename(facts, function, name))
    return edits


def _rename(facts: Facts, function: cst.FunctionDef, name: str) -> dict[cst.CSTNode, edit.Edit]:
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for node in edit.walk(function):
        if isinstance(node, cst.Name) and node.value == name and not _is_keyword(facts, node):
            edits[node] = edit.replace("positions")
    for record in facts.calls_of(function):
        if isinstance(record.site, cst.Call):
            for arg in record.site.args:
                if arg.keyword is not None and arg.keyword.value == name:
                    edits[arg.keyword] = edit.replace("positions")
    return edits


def _is_keyword(facts: Facts, node: cst.Name) -> bool:
    above = edit.parent(facts.program.tree, node)
    return (isinstance(above, cst.Arg) and above.keyword is node) or (
        isinstance(above, cst.Attribute) and above.attr is node
    )


def _computed(facts: Facts) -> dict[cst.CSTNode, edit.Edit]:
    """Replace position ids that the file counts itself, where an embedding or a table is looked up with them."""
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for function in facts.called:
        for node in edit.walk(function.body):
            ids = _looked_up(facts, node)
            if ids is None:
                continue
            for inner in edit.walk(ids):
                if isinstance(inner, cst.BaseExpression) and _counts(facts.values(inner)):
                    if isinstance(inner, cst.Name) and inner.value == "positions":
                        if "positions" not in {p.name.value for p in edit.params_of(function)}:
                            edits.update(_own_positions(facts, function))
                    else:
                        edits[inner] = edit.replace("positions")
                    break
    return edits


def _own_positions(facts: Facts, function: cst.FunctionDef) -> dict[cst.CSTNode, edit.Edit]:
    """Drop what a function counts under the name `positions` itself."""
    return {
        n: edit.remove
        for n in edit.walk(function.body)
        if isinstance(n, cst.Assign)
        and [edit.code(t) for t in edit.targets(n)] == ["positions"]
        and all(isinstance(v, Tensor) and v.sizes_only for v in facts.values(n.value))
    }


def _looked_up(facts: Facts, node: cst.CSTNode) -> cst.BaseExpression | None:
    """The ids of an embedding call or of an index into a table."""
    values = [v for v in facts.values(node) if isinstance(v, Tensor)]
    if isinstance(node, cst.Call) and node.args and any(v.op == "embedding" for v in values):
        made = [v for v in values if v.op == "embedding"]
        arg = node.args[0].value
        if all(any(v is m.args[0] for v in facts.values(arg)) for m in made):
            return arg
    if isinstance(node, cst.Subscript) and any(v.op == "getitem" for v in values):
        index = node.slice[0].slice
        if isinstance(index, cst.Index) and any(
            isinstance(v, Tensor) and v.sizes_only for v in facts.values(index.value)
        ):
            return index.value
    return None


def _counts(values: list[Value]) -> bool:
    """Whether values are 0, 1, 2 ... along the sequence, whatever the batch."""
    if not values or not all(isinstance(v, Tensor) and v.sizes_only and v.shape for v in values):
        return False
    for value in values:
        try:
            array = Evaluator(Point(seq=LONG))(value)
        except Unevaluable:
            return False
        rows = array.reshape(-1, array.shape[-1]) if getattr(array, "ndim", 0) else array
        if getattr(rows, "ndim", 0) != 2 or rows.shape[-1] != LONG:
            return False
        if not all((row == range(LONG)).all() for row in rows):
            return False
    return True


_INPUTS_BEFORE = """\
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
_INPUTS_AFTER = _INPUTS_BEFORE.replace(
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
    reason = "the attention layers need positions, their cache and the batch's metadata"
    EXAMPLES = (Example(_INPUTS_BEFORE, _INPUTS_AFTER),)

    def apply(self, facts: Facts) -> cst.Module:
        _one_cache_each(facts)
        edits: dict[cst.CSTNode, edit.Edit] = {}
        missing = {f: m for f in facts.called if (m := _missing(facts, f))}
        for function, names in missing.items():
            edits[function] = _with_params(names)
            for record in facts.calls_of(function):
                if isinstance(record.site, cst.Call):
                    edits.update(_at_site(facts, record, names))
            if missing:
                break
        return edit.rewrite(facts.program.tree, edits)


_INDEX_BEFORE = """\
from torch import nn


class OakBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.scale = config.scales[layer_idx]

    def forward(self, hidden_states):
        return hidden_states * self.scale


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OakBlock(config) for i in range(config.num_layers)])

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states
"""
_INDEX_AFTER = _INDEX_BEFORE.replace(
    """\
class OakBlock(nn.Module):
    def __init__(self, config):
""",
    """\
class OakBlock(nn.Module):
    def __init__(self, config, layer_idx):
""",
).replace(
    "self.layers = nn.ModuleList([OakBlock(config) for i in range(config.num_layers)])",
    "self.layers = nn.ModuleList([OakBlock(config, layer_idx=i) for i in range(config.num_layers)])",
)


class ThreadLayerIndex(Pass):
    """A layer whose traits depend on its number is told its number."""

    stage = Stage.ATTEND
    reason = "the layer's traits depend on its number"
    EXAMPLES = (Example(_INDEX_BEFORE, _INDEX_AFTER),)

    def apply(self, facts: Facts) -> cst.Module:
        for function in facts.called:
            have = {p.name.value for p in edit.params_of(function)} | {
                t.value
                for n in edit.walk(function.body)
                if isinstance(n, cst.Assign)
                for t in edit.targets(n)
                if isinstance(t, cst.Name)
            }
            if function.name.value != "__init__" or INDEX in have or not _reads_index(function):
                continue
            edits: dict[cst.CSTNode, edit.Edit] = {function: _with_params([INDEX])}
            for record in facts.calls_of(function):
                if isinstance(record.site, cst.Call):
                    edits[record.site] = _with_index(_counter(facts, record.site))
            return edit.rewrite(facts.program.tree, edits)
        return facts.program.tree


INDEX = "layer_idx"


def _reads_index(function: cst.FunctionDef) -> bool:
    """Whether an __init__ reads the layer's number outside of loops that count it themselves."""
    loops = [n for n in edit.walk(function.body) if isinstance(n, cst.ListComp | cst.GeneratorExp | cst.For)]
    inside = {n for loop in loops for n in edit.walk(loop)}
    return any(isinstance(n, cst.Name) and n.value == INDEX and n not in inside for n in edit.walk(function.body))


def _counter(facts: Facts, site: cst.Call) -> str:
    """The variable that counts layers where a layer is created."""
    loop = edit.enclosing(facts.program.tree, site, cst.ListComp, cst.GeneratorExp)
    if loop is not None and isinstance(loop.for_in.target, cst.Name):
        return str(loop.for_in.target.value)
    return INDEX


def _with_index(name: str) -> edit.Edit:
    def change(updated: cst.Call) -> cst.Call:
        args = [a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in updated.args]
        return updated.with_changes(args=[*args, cst.Arg(cst.Name(name), keyword=cst.Name(INDEX), equal=_EQUAL)])

    return change


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


def _with_params(names: list[str]) -> edit.Edit:
    def change(updated: cst.FunctionDef) -> cst.FunctionDef:
        params = list(updated.params.params)
        first = _place([p.name.value for p in params])
        comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
        params = [p.with_changes(comma=comma, default=None, equal=cst.MaybeSentinel.DEFAULT) for p in params]
        for name in names:
            place = first if name == "positions" else len(params)
            params.insert(place, cst.Param(cst.Name(name), comma=comma))
        params[-1] = params[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return updated.with_changes(params=updated.params.with_changes(params=params))

    return change


def _place(params: list[str]) -> int:
    """Where `positions` goes: after the token ids if there are any, else first."""
    if "input_ids" in params:
        return params.index("input_ids") + 1
    return 1 if params[:1] == ["self"] else 0


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
            if name == "positions" and all(a.keyword is None and not a.star for a in args[: _place(params)]):
                args.insert(_place(params), arg)
            elif plain:
                args.append(arg)
            else:
                args.append(cst.Arg(edit.parse(value), keyword=cst.Name(name), equal=_EQUAL))
        return updated.with_changes(args=args, whitespace_before_args=cst.SimpleWhitespace(""))

    return change


_EQUAL = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))


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
