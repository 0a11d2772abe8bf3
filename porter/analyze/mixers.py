"""Ways of mixing tokens that no paged cache of keys and values serves, found by what the code of a model does.

Read from the syntax tree, for models that symbolic execution gave up on: it may have stumbled over a detail of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import libcst as cst

from porter.analyze.program import ClassInfo, FunctionInfo, Program, full_name
from porter.passes import edit

_OF_TOKENS = frozenset({"position_ids", "position_embeddings", "past_key_values"})  # what no router of experts gets


@dataclass(frozen=True)
class Mixer:
    """Where tokens are mixed, and how."""

    node: cst.CSTNode
    why: str
    remedy: str


def find_mixer(program: Program, entry: ClassInfo) -> Mixer | None:
    """The first mixing of tokens, in the code that the entry class reaches, that is no attention over a paged cache."""
    reached = list(_reached(program, entry))
    for why, remedy, find in _KINDS:
        for function in reached:
            node = find(function.node, program)
            if node is not None:
                return Mixer(node, why, remedy)
    return None


def _reached(program: Program, entry: ClassInfo) -> Iterator[FunctionInfo]:
    """Functions and methods that the names in a class lead to, the class's own first."""
    seen: set[str] = set()
    todo: list[str] = [entry.name]
    while todo:
        name = todo.pop(0)
        if name in seen:
            continue
        seen.add(name)
        functions = [program.functions[name]] if name in program.functions else []
        if name in program.classes:
            functions = [f for info in program.mro(program.classes[name]) for f in info.methods.values()]
        yield from functions
        nodes: list[cst.CSTNode] = [f.node for f in functions]
        nodes += [program.constants[name]] if name in program.constants else []
        for node in nodes:
            todo += [n.value for n in edit.walk(node) if isinstance(n, cst.Name) and n.value not in seen]


def _calls(node: cst.CSTNode, *names: str) -> Iterator[cst.Call]:
    """Calls of functions or methods by their last names."""
    for call in edit.walk(node):
        if isinstance(call, cst.Call):
            last = call.func.attr.value if isinstance(call.func, cst.Attribute) else full_name(call.func)
            if last in names:
                yield call


def _names(node: cst.CSTNode) -> set[str]:
    return {n.value for n in edit.walk(node) if isinstance(n, cst.Name)}


def _assignments(node: cst.CSTNode) -> Iterator[tuple[set[str], cst.BaseExpression]]:
    """(names assigned, value) of the assignments below a node."""
    for each in edit.walk(node):
        if isinstance(each, cst.Assign):
            targets = [t.target for t in each.targets]
            yield (
                {n for t in targets if not isinstance(t, cst.Subscript | cst.Attribute) for n in _names(t)},
                each.value,
            )


def _from(function: cst.CSTNode, roots: set[str]) -> set[str]:
    """`roots` and the names that assignments make from them."""
    known = set(roots)
    for _ in range(3):
        known |= {name for names, value in _assignments(function) if _names(value) & known for name in names}
    return known


def _recurrence(function: cst.FunctionDef, program: Program) -> cst.CSTNode | None:
    """A loop over positions whose turns hand a value on: `for t in range(length): state = f(state, x[:, t])`."""
    lengths = _from(function, {n for names, value in _assignments(function) if _is_size(value) for n in names})
    for loop in edit.walk(function):
        bound: cst.CSTNode
        places: cst.CSTNode
        if isinstance(loop, cst.For) and next(_calls(loop.iter, "range"), None) is not None:
            bound, places = loop.iter, loop.target
        elif isinstance(loop, cst.While):
            bound, places = loop.test, loop.test
        else:
            continue
        over_tokens = _is_size(bound) or bool(_names(bound) & lengths)
        if over_tokens and _carries(loop.body) and _picks(loop.body, _from(loop, _names(places))):
            return loop
    return None


def _carries(body: cst.CSTNode) -> bool:
    """Whether a turn of a loop reads what the one before it wrote, in a name or in place."""
    named = any(names & _names(value) for names, value in _assignments(body))
    return named or next(_calls(body, "copy_"), None) is not None


def _is_size(value: cst.CSTNode) -> bool:
    return any(isinstance(n, cst.Attribute) and n.attr.value in ("shape", "size") for n in edit.walk(value))


def _picks(body: cst.CSTNode, places: set[str]) -> bool:
    """Whether an item or a slice along an axis that is not the first is taken at one of `places`."""
    subscripts = [n for n in edit.walk(body) if isinstance(n, cst.Subscript) and len(n.slice) > 1]
    return any(_names(element) & places for s in subscripts for element in s.slice[1:])


def _convolution(function: cst.FunctionDef, program: Program) -> cst.CSTNode | None:
    return next(_calls(function, "Conv1d"), None)


def _patches(function: cst.FunctionDef, program: Program) -> cst.CSTNode | None:
    return next(_calls(function, "scatter_reduce", "scatter_reduce_"), None)


def _buckets(function: cst.FunctionDef, program: Program) -> cst.CSTNode | None:
    """A sort whose order a class of attention takes its queries and keys in."""
    sorting = {n for n, f in program.functions.items() if next(_calls(f.node, "argsort"), None) is not None}
    sorts = next(_calls(function, "argsort", *sorting), None)
    owners = [c for c in program.classes.values() if any(f.node is function for f in c.methods.values())]
    return sorts if any(next(_calls(c.node, "softmax", "logsumexp"), None) is not None for c in owners) else None


def _streams(function: cst.FunctionDef, program: Program) -> cst.CSTNode | None:
    """One method called with two queries on the same keys and values."""
    calls = [
        c
        for c in edit.walk(function)
        if isinstance(c, cst.Call) and full_name(c.func).startswith("self.") and len(c.args) > 2
    ]
    for one, other in combinations(calls, 2):
        same = full_name(one.func) == full_name(other.func)
        first, second = ([full_name(a.value) for a in c.args[:3]] for c in (one, other))
        plain = not any("." in name or not name for name in first + second)
        if same and plain and first[0] != second[0] and first[1:] == second[1:]:
            return other
    return None


def _joined_rows(function: cst.FunctionDef, program: Program) -> cst.CSTNode | None:
    """`cat([rows] + others, 1)`, or ids joined with others: the layers see more rows than there are tokens."""
    for call in _calls(function, "cat", "concat"):
        rows = call.args[0].value if call.args else None
        axis = [a.value for a in call.args[1:] if a.keyword is None or a.keyword.value == "dim"]
        along = bool(axis) and getattr(axis[0], "value", "") == "1"
        items = rows.elements if isinstance(rows, cst.Tuple | cst.List) else ()
        if along and (isinstance(rows, cst.BinaryOperation) or any(full_name(i.value) == "input_ids" for i in items)):
            return call
    return None


def _shared_keys(function: cst.FunctionDef, program: Program) -> cst.CSTNode | None:
    """Two values read from an item of an argument in one layer, that another layer put there: `k, v = shared[i]`."""
    params = {p.name.value for p in (*function.params.params, *function.params.kwonly_params)}
    read: dict[str, cst.CSTNode] = {}
    written: set[str] = set()
    for each in (n for n in edit.walk(function) if isinstance(n, cst.Assign)):
        target, value = each.targets[0].target, each.value
        if isinstance(target, cst.Tuple) and len(target.elements) == 2 and isinstance(value, cst.Subscript):
            read.setdefault(full_name(value.value), value)
        if isinstance(target, cst.Subscript) and isinstance(value, cst.Tuple) and len(value.elements) == 2:
            written.add(full_name(target.value))
    return next((node for name, node in read.items() if name in written & params), None)


def _run_again(function: cst.FunctionDef, program: Program) -> cst.CSTNode | None:
    """A part of the model that a loop runs again and again, with a cache."""
    for loop in edit.walk(function):
        if not isinstance(loop, cst.For) or next(_calls(loop.iter, "range"), None) is None:
            continue
        for call in edit.walk(loop.body):
            part = isinstance(call, cst.Call) and full_name(call.func).startswith("self.")
            if part and any(full_name(a.value) == "past_key_values" for a in cst.ensure_type(call, cst.Call).args):
                return call
    return None


def _indexer(function: cst.FunctionDef, program: Program) -> cst.CSTNode | None:
    """The best of scores, in a function that is given positions or a cache, or makes a mask of them."""
    params = {p.name.value for p in (*function.params.params, *function.params.kwonly_params)}
    masks = "attention_mask" in params and next(_calls(function, "scatter", "scatter_"), None) is not None
    return next(_calls(function, "topk"), None) if params & _OF_TOKENS or masks else None


_Find = Callable[[cst.FunctionDef, Program], cst.CSTNode | None]
_STATE = "use an engine that keeps such a state for each sequence"
_KINDS: tuple[tuple[str, str, _Find], ...] = (
    (
        "tokens are sorted into buckets, and each attends in its bucket (LSH attention); which keys it sees depends on "
        "the whole sequence, and pages are in the order of positions",
        "use the model with its own code",
        _buckets,
    ),
    (
        "two streams of queries over the same keys and values, as permutation language models have; a token has one "
        "row in the engine",
        "use the model with its own code",
        _streams,
    ),
    (
        "tokens are joined to patches whose ends depend on data, and layers run over patches; the engine counts "
        "tokens and knows no patches",
        "use the model with its own code",
        _patches,
    ),
    (
        "further rows are joined to the tokens' rows along the sequence (learned prompts, n-gram streams); in the "
        "engine a token has one row and each row a token",
        "use the model with its own code",
        _joined_rows,
    ),
    (
        "an indexer picks the keys that a token attends to, the best of scores of its own over all tokens (sparse "
        "attention); it needs a cache of the indexer's keys, which the runtime does not have",
        "use an engine with sparse attention",
        _indexer,
    ),
    (
        "a layer attends to keys and values that another layer made (KV sharing across layers); in the runtime each "
        "layer has a cache of its own",
        "use an engine that shares caches between layers",
        _shared_keys,
    ),
    (
        "the same layers run again and again for one token, and each time with other keys and values; in the runtime a "
        "layer has one cache",
        "use the model with its own code",
        _run_again,
    ),
    (
        "a convolution along the sequence, as state-space and linear-attention layers have; it keeps a state from "
        "token to token",
        _STATE,
        _convolution,
    ),
    (
        "a recurrence over positions: each turn of the loop needs what the one before it left, a state that goes from "
        "token to token",
        _STATE,
        _recurrence,
    ),
)
