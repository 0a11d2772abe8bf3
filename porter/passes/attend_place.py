"""Where a file's attention is: the function, its projections and its merged heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import libcst as cst

from porter.analyze.attention import find_cores
from porter.analyze.core import Core, NotUnderstood, layout_chain
from porter.analyze.facts import Facts, World, line_of
from porter.analyze.rotation import turns
from porter.analyze.settled_sizes import settle
from porter.analyze.values import Instance, Sequence, Tensor, Value
from porter.errors import Refusal
from porter.passes import edit


@dataclass(eq=False)
class Found:
    """One attention on one path, placed in the file."""

    world: World
    core: Core
    function: cst.FunctionDef
    owner: Instance
    merged: cst.BaseExpression
    sources: list[cst.BaseExpression]
    made: list[Tensor]  # the values of the sources
    merges_heads: bool


@dataclass(eq=False)
class Group:
    """The attention of one function, over all paths."""

    function: cst.FunctionDef
    found: list[Found] = field(default_factory=list)


def read_attention(facts: Facts) -> dict[int, list[Core]]:
    """The attention of every path, by the number of the path.

    Raises:
        Refusal: an attention is there but is not understood.
    """
    found: dict[int, list[Core]] = {}
    for i, world in enumerate(facts.worlds):
        try:
            found[i] = find_cores(world)
        except NotUnderstood as error:
            raise Refusal(
                "",
                _core_line(facts, world),
                "attention",
                str(error),
                "see porter explain attend for what is understood",
                "P200",
            ) from error
    return found


def find_groups(facts: Facts) -> list[Group]:
    groups: dict[cst.FunctionDef, Group] = {}
    for i, cores in read_attention(facts).items():
        world = facts.worlds[i]
        for core in cores:
            found = _place(facts, world, core)
            group = groups.setdefault(found.function, Group(found.function))
            group.found.append(found)
    return list(groups.values())


def _core_line(facts: Facts, world: World) -> int:
    for node, values in world.values.items():
        if any(_attends(v) for v in values):
            return line_of(facts.program.tree, node)
    return 0


def _attends(value: Value) -> bool:
    """Whether a value is attention's, or what an attention interface returns: its heads moved, and weights."""
    items = value.items if isinstance(value, Sequence) else (value,)
    return any(v.op in ("attention", "softmax") or any(a.op == "attention" for a in v.args[:1]) for v in items)


def _place(facts: Facts, world: World, core: Core) -> Found:
    """Find, in one function, the expressions that project q, k, v and the one that merges the heads."""
    chains = [_down_to(v, s) for v, s in zip((core.query, core.key, core.value), core.sources, strict=True)]
    merged = _merged_nodes(world, core)
    functions: dict[cst.FunctionDef, tuple[cst.BaseExpression, bool]] = {}
    for node, merges in merged:
        function = edit.enclosing(facts.program.tree, node, cst.FunctionDef)
        if function is not None:
            functions.setdefault(function, (node, merges))
    for function, (node, merges) in functions.items():
        inside = {n: i for i, n in enumerate(edit.walk(function.body))}
        picked = [_source_node(world, c, inside) for c in chains]
        owner = _owner(world, core, function)
        if all(p is not None for p in picked) and owner is not None:
            known = [p for p in picked if p is not None]
            return Found(world, core, function, owner, node, [n for n, _ in known], [v for _, v in known], merges)
    raise Refusal(
        "",
        _core_line(facts, world),
        "attention",
        "its projections and its merged heads are not in one method",
        "bring them into one forward",
        "P202",
    )


def _owner(world: World, core: Core, function: cst.FunctionDef) -> Instance | None:
    """The object whose call of the function computed this attention: the first that returns what comes of it."""
    records = [c for c in world.calls if c.function.node is function and isinstance(c.receiver, Instance)]
    if len({id(c.receiver) for c in records}) > 1:
        records = [c for c in records if c.result is not None and any(v is core.output for v in _walk(c.result))]
    return records[0].receiver if records and isinstance(records[0].receiver, Instance) else None


def _walk(result: Value) -> Iterator[Value]:
    for item in result.items if isinstance(result, Sequence) else (result,):
        yield from item.walk()


def _down_to(value: Tensor, source: Tensor) -> list[Tensor]:
    chain = layout_chain(value)
    return chain[: chain.index(source) + 1]


def _merged_nodes(world: World, core: Core) -> list[tuple[cst.BaseExpression, bool]]:
    """Expressions whose value is the attention's output with its heads merged; else with heads apart."""
    whole: list[tuple[cst.BaseExpression, bool]] = []
    apart: list[tuple[cst.BaseExpression, bool]] = []
    assert core.heads is not None and core.v_head_dim is not None
    width, taken = core.heads * core.v_head_dim, dict(world.decisions)
    for node, values in world.values.items():
        if isinstance(node, cst.Name | cst.Tuple) or not isinstance(node, cst.BaseExpression):
            continue
        for value in values:
            if not isinstance(value, Tensor) or value.shape is None or core.output not in layout_chain(value):
                continue
            shape = [settle(s, taken) for s in value.shape]
            if shape[-1] == width and all(s.has_tokens for s in shape[:-1]):
                whole.append((node, True))
            elif shape[-2:] == [core.heads, core.v_head_dim]:
                apart.append((node, False))
    return whole or apart


def _source_node(
    world: World, chain: list[Tensor], inside: dict[cst.CSTNode, int]
) -> tuple[cst.BaseExpression, Tensor] | None:
    """The expression of a function that makes the earliest of a chain of layouts; a name only if nothing else does."""
    for value in reversed(chain):
        best: cst.BaseExpression | None = None
        for node in inside:
            if isinstance(node, cst.BaseExpression) and any(v is value for v in world.values.get(node, ())):
                if not isinstance(node, cst.Name):
                    return node, value
                best = best or node
        if best is not None:
            return best, value
    return None


def turns_queries(facts: Facts) -> bool:
    """Whether queries are turned by position on any path, in the file's own code or in an attention layer."""
    for world in facts.worlds:
        for values in world.values.values():
            for value in values:
                if value.op == "attention" and turns(value.attrs["given"]["query"]):
                    return True
                if value.op in ("matmul", "bmm", "baddbmm", "einsum") and any(turns(a) for a in value.args):
                    return True
                if value.op == "paged_attention":
                    layer = value.attrs["layer"]
                    if layer.attrs.get("class") == "PagedAttentionWithRoPE" or any(turns(a) for a in value.args):
                        return True
    return False
