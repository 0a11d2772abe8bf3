"""Read how heads are laid out in the projections, checked on labels."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np

from porter.analyze.core import Core, Inconsistent, NotUnderstood, layout_chain
from porter.analyze.evaluate import Evaluator
from porter.analyze.point import BATCH_SIZE, SEQ_LENGTH, Point, Unevaluable
from porter.analyze.poly import Poly
from porter.analyze.values import Tensor


def read_heads(core: Core) -> None:
    """Head count and sizes from the shapes of query and value as the products see them."""
    shape = core.query.shape
    if shape is None:
        raise NotUnderstood("the layout of the queries is unknown")
    core.head_dim = shape[-1]
    core.v_head_dim = core.value.shape[-1] if core.value.shape else None
    rest = Poly.const(1)
    for size in shape[:-1]:
        rest = rest * size
    core.heads = rest.without_tokens()


def read_sources(core: Core, point: Point) -> None:
    """Follow q, k, v down to what projected them, and check on labels how their heads are laid out."""
    rotation = core.rotation
    query = rotation.query if rotation else core.query
    key = rotation.key if rotation else core.key
    chains = [layout_chain(query), layout_chain(key), layout_chain(core.value)]
    core.query, core.key, core.value = query, key, core.value
    heads = int(point.size(core.heads or Poly.const(1)))
    dims = [int(point.size(d or Poly.const(1))) for d in (core.head_dim, core.head_dim, core.v_head_dim)]
    core.sources = tuple(c[-1] for c in chains)
    one = core.sources[0] is core.sources[1] is core.sources[2] and core.sources[0].op == "linear"
    if one:
        tables = [_heads_in(c, c[-1], point, d) for c, d in zip(chains, dims, strict=True)]
    else:
        picked = [_in_order(c, point, d) for c, d in zip(chains, dims, strict=True)]
        core.sources = tuple(source for source, _ in picked)
        tables = [table for _, table in picked]
    if tables[0].shape[0] != heads:
        raise NotUnderstood("the queries are not laid out as heads")
    kept = [_ungroup(t, heads) for t in tables]
    if len({k.shape[0] for k in kept[1:]}) != 1:
        raise NotUnderstood("keys and values have different numbers of heads")
    kv = kept[1].shape[0]
    if one:
        core.fused = _fused_layout(core, chains, point)
    core.kv_heads = _kv_size(chains[1], int(kv), core, point)


def _heads_in(chain: list[Tensor], source: Tensor, point: Point, dim: int) -> Any:
    """Which feature of `source` each [head, dim] at the top of a chain of layouts holds."""
    labels = _labels(chain[0], source, point)
    if labels.size % dim:
        raise NotUnderstood("keys and values have different numbers of heads")
    return labels.reshape(-1, dim)


def _in_order(chain: list[Tensor], point: Point, dim: int) -> tuple[Tensor, Any]:
    """The deepest of a chain of layouts that holds the heads in order, and nothing else; what is above it stays."""
    for source in reversed(chain):
        table = _heads_in(chain, source, point, dim)
        distinct = _ungroup(table, len(table)).ravel()
        if (distinct == np.arange(distinct.size)).all() and _width(source, point) == distinct.size:
            return source, table
        if np.unique(table).size != distinct.size:
            break
    raise NotUnderstood("heads are taken from the projections in an order that is not contiguous")


def _width(value: Tensor, point: Point) -> int:
    """Numbers a token."""
    return int(np.prod(Evaluator(point).shape(value))) // (BATCH_SIZE * SEQ_LENGTH)


def _labels(value: Tensor, source: Tensor, point: Point) -> Any:
    """Which feature of `source` each [head, dim] of `value` holds, after checking that tokens stay in place."""
    e = Evaluator(point)
    shape, width = e.shape(source), _width(source, point)
    axis = [i for i, s in enumerate(source.shape or ()) if s.has_tokens]
    labels = _feature_labels(shape, axis, width)
    e.memo[id(source)] = labels
    try:
        found = np.asarray(e(value))
    except Unevaluable as error:
        raise Inconsistent(f"the heads go through {error}") from error
    return _per_token(found, width)


def _feature_labels(shape: tuple[int, ...], token_axes: list[int], width: int) -> Any:
    """token * width + feature for every element, tokens counted over the token axes in their order."""
    rest = [i for i in range(len(shape)) if i not in token_axes]
    order = [*token_axes, *rest]
    flat = np.arange(int(np.prod(shape))).reshape([shape[i] for i in order])
    return np.transpose(flat, np.argsort(order))


def _per_token(found: Any, width: int) -> Any:
    """The features of token 0, after checking that every token carries the same features in the same order."""
    tokens = BATCH_SIZE * SEQ_LENGTH
    per = found.size // tokens
    rows = np.empty((tokens, per), dtype=int)
    owner, feature = found // width, found % width
    flat_owner, flat_feature = owner.ravel(), feature.ravel()
    for token in range(tokens):
        picked = flat_feature[flat_owner == token]
        if picked.size != per:
            raise NotUnderstood("heads mix tokens")
        rows[token] = picked
    if not (rows == rows[0]).all():
        raise NotUnderstood("heads are laid out differently from token to token")
    return rows[0]


def _ungroup(table: Any, heads: int) -> Any:
    """Undo repeat_kv: one row for each distinct head, each repeated equally often in a row."""
    rows = table.reshape(-1, table.shape[-1])
    distinct = [rows[0]]
    for row in rows[1:]:
        if not (row == distinct[-1]).all():
            distinct.append(row)
    times = rows.shape[0] // len(distinct)
    if (
        not (np.repeat(np.asarray(distinct), times, axis=0) == rows).all()
        if times * len(distinct) == len(rows)
        else True
    ):
        raise NotUnderstood("key-value heads are shared in an order that is not grouped")
    return np.asarray(distinct)


def _fused_layout(core: Core, chains: list[list[Tensor]], point: Point) -> str:
    """How one projection holds q, k and v, in the words of the runtime's `arrangement`.

    A number of groups that is not 1 is told from the number of heads by trying twice as many heads.
    """
    found = _layouts(core, chains, point)
    if "1 qkv" not in found:
        more = _layouts(core, chains, point.doubled())
        found = [layout for layout in found if layout in more]
    if not found:
        raise NotUnderstood("one projection holds q, k and v in an order that is neither contiguous nor in groups")
    return {"1 qkv": "contiguous", "kv qkv": "grouped"}.get(found[0], found[0])


def _layouts(core: Core, chains: list[list[Tensor]], point: Point) -> list[str]:
    """Every layout that fits at a point, one group first, then one for each KV head."""
    dims = [int(point.size(d or Poly.const(1))) for d in (core.head_dim, core.head_dim, core.v_head_dim)]
    tables = [_heads_in(c, c[-1], point, d) for c, d in zip(chains, dims, strict=True)]
    query, key, value = (_ungroup(t, len(t)) for t in tables)
    counts = {"1": 1, "kv": len(key)} | {str(n): n for n in range(2, len(key) + 1) if len(key) % n == 0}
    return [
        f"{name} {''.join(order)}"
        for name, groups in counts.items()
        for order in permutations("qkv")
        if _is_in_groups({"q": query, "k": key, "v": value}, order, groups)
    ]


def _is_in_groups(tables: dict[str, Any], order: tuple[str, ...], groups: int) -> bool:
    parts = [tables[shard].reshape(groups, -1) for shard in order]
    features = np.concatenate(parts, axis=1).ravel()
    return bool((features == np.arange(features.size)).all())


def _kv_size(chain: list[Tensor], kv: int, core: Core, point: Point) -> Poly:
    """The number of key-value heads as a size: the one in the chain that evaluates to what the labels show."""
    if kv == 1:
        return Poly.const(1)
    for value in reversed(chain):
        for size in value.shape or ():
            free = size.without_tokens() if size.has_tokens else size
            if free is not None and free.symbols and point.size(free) == kv and free != core.head_dim:
                return free
    last = chain[-1].shape
    if last is not None and core.head_dim is not None:
        quotient = last[-1].divide(core.head_dim)
        if quotient is not None and point.size(quotient) == kv:
            return quotient
    raise NotUnderstood("the number of key-value heads is no size of the config")
