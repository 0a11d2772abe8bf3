"""What a checkpoint holds and a port does not: weights of modules that no path calls, and second names of tied ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import libcst as cst

from porter.analyze.facts import World
from porter.analyze.program import ClassInfo, Program
from porter.analyze.values import Instance, Layer, Repeated, Sequence, Tensor, Value

_WEIGHTED = frozenset({"linear", "conv1d", "embedding", "layer_norm", "rms_norm"})


def weighted(worlds: Iterable[World]) -> frozenset[str]:
    """The dotted path of every layer and parameter that has weights; `{i}` stands for a layer's number."""
    return frozenset(path for w in worlds if w.entry is not None for path in _below(w.entry, ""))


def _below(value: Value, path: str) -> Iterator[str]:
    if isinstance(value, Instance | Layer):
        if isinstance(value, Layer) and (value.kind in _WEIGHTED or value.attrs.get("class", "").startswith("Fused")):
            yield path
        for name, inner in _held(value).items():
            yield from _below(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, Tensor) and value.op == "parameter":
        yield path


def _held(value: Instance | Layer) -> dict[str, Value]:
    held = {k: v for k, v in value.attrs.items() if isinstance(v, Value) and k != "<layer>"}
    shell = value.attrs.get("<layer>")
    if isinstance(shell, Layer):
        held |= {name: Tensor(op="parameter") for name in ("weight", "bias")}
    items = value.params.get("items") if isinstance(value, Layer) else None
    if isinstance(items, Repeated):
        held["{i}"] = items.item
    elif isinstance(items, Sequence):
        held |= {str(i): item for i, item in enumerate(items.items)}
    return held


def uncalled(before: frozenset[str], after: frozenset[str], replaced: Iterable[str]) -> set[str]:
    """Pieces of checkpoint names that belong to modules of the file which its port lacks as a whole.

    `replaced` are the names of modules that the port holds in another form.
    """
    gone: set[str] = set()
    for path in before - after:
        parts = path.split(".")
        if any(".".join(parts[:n]) in after for n in range(1, len(parts))) or set(parts) & set(replaced):
            continue
        kept = max((n for n in range(len(parts)) if _has(after, parts[:n])), default=0)
        lost = parts[: kept + 1]
        piece = lost[-1:] if not _within(lost[-1], after) else lost[-2:]
        if not _within(".".join(piece), after) and "{i}" not in piece and piece[-1] not in ("weight", "bias"):
            gone.add(".".join(piece))
    return gone


def _has(paths: frozenset[str], prefix: list[str]) -> bool:
    start = ".".join(prefix)
    return not start or any(path == start or path.startswith(f"{start}.") for path in paths)


def _within(piece: str, paths: frozenset[str]) -> bool:
    return any(f".{piece}." in f".{path}." for path in paths)


def second_names(program: Program, entry: ClassInfo, before: frozenset[str], after: frozenset[str]) -> dict[str, str]:
    """Names under which a file ties a parameter that its port has once: the checkpoint has either."""
    keys = next(
        (c.constants["_tied_weights_keys"] for c in program.mro(entry) if "_tied_weights_keys" in c.constants), 0
    )
    pairs = _pairs(keys) if isinstance(keys, cst.Dict) else {}
    return {
        other: name
        for name, other in pairs.items()
        if other in before and other not in after and name.rpartition(".")[0] in after and name.endswith(".bias")
    }


def _pairs(node: cst.Dict) -> Mapping[str, str]:
    return {
        str(e.key.evaluated_value): str(e.value.evaluated_value)
        for e in node.elements
        if isinstance(e, cst.DictElement)
        and isinstance(e.key, cst.SimpleString)
        and isinstance(e.value, cst.SimpleString)
    }
