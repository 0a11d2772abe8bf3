"""The weight rules of a port: what its checkpoints call the tensors, and how they hold them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import libcst as cst

from porter.analyze.checkpoint_names import calls_in, plain_name, renames
from porter.analyze.facts import Facts, World
from porter.analyze.program import Program, full_name
from porter.analyze.unused_weights import second_names, uncalled, weighted
from porter.analyze.values import Tensor
from porter.source import Source

SKIPPED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Rules:
    """The fields of runtime's WeightRules, in the order in which a port writes them."""

    packed: dict[str, dict[str, str | int]] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    tied: dict[str, str] = field(default_factory=dict)
    renames: dict[str, str] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    base_prefix: str = ""

    def source(self) -> str:
        """Python source of the rules, without the empty ones."""
        given = [f"{k}={v!r}" for k, v in asdict(self).items() if v]
        return f"WeightRules({', '.join(given)})"


def derive(source: Source, before: Program, after: Facts, notes: dict[str, Any]) -> Rules:
    """Rules from the source's class attributes and buffers, transformers' renames, and what packing did."""
    packed = notes.get("packed", {})
    had, has = notes.get("weighted", frozenset()), weighted(after.worlds)
    replaced = {*notes.get("fused", ()), *(part for parts in packed.values() for part in parts)}
    entry = before.classes.get(after.entry.name, after.entry)
    return Rules(
        packed={k: dict(v) for k, v in packed.items()},
        fused=dict(notes.get("fused", {})),
        transposed=tuple(sorted(notes.get("transposed", ()))),
        tied=_tied(after.worlds[0]),
        renames=second_names(before, entry, had, has) | renames(source, after, packed),
        skip=tuple(sorted({*_skipped(before, after), *uncalled(had, has, replaced)})),
        base_prefix=_base_prefix(before, after),
    )


def _tied(world: World) -> dict[str, str]:
    """The head is tied to the token embedding when the config says so."""
    head = table = ""
    for values in world.values.values():
        for value in values:
            layer = value.attrs.get("layer") if isinstance(value, Tensor) else None
            if layer is None:
                continue
            if layer.attrs.get("class") == "ParallelLMHead":
                head = layer.path
            elif layer.attrs.get("class") == "VocabParallelEmbedding" and value.args[0].op == "input_ids":
                table = layer.path
    return {f"{head}.weight": f"{table}.weight"} if head and table else {}


def _base_prefix(before: Program, after: Facts) -> str:
    """`base_model_prefix` of the class: checkpoints of the bare model lack it."""
    for info in before.mro(before.classes.get(after.entry.name, after.entry)):
        node = info.constants.get("base_model_prefix")
        if isinstance(node, cst.SimpleString):
            return str(node.evaluated_value)
    return ""


def _skipped(before: Program, after: Facts) -> tuple[str, ...]:
    """Buffers that the file registered and the port has no use for, and what the class says to ignore."""
    found = set(SKIPPED)
    entry = before.classes.get(after.entry.name)
    for info in before.mro(entry) if entry is not None else ():
        node = info.constants.get("_keys_to_ignore_on_load_unexpected")
        if isinstance(node, cst.List):
            found |= {
                plain_name(str(e.value.evaluated_value)) for e in node.elements if isinstance(e.value, cst.SimpleString)
            }
    for cls in before.classes.values():
        init = cls.methods.get("__init__")
        if init is not None:
            found |= _buffers(init.node)
    return tuple(sorted(f for f in found if f))


def _buffers(init: cst.FunctionDef) -> set[str]:
    """Names given to register_buffer for masks and biases that old checkpoints carry."""
    found: set[str] = set()
    for node in calls_in(init):
        if (
            full_name(node.func) == "self.register_buffer"
            and node.args
            and isinstance(node.args[0].value, cst.SimpleString)
        ):
            name = str(node.args[0].value.evaluated_value)
            if name in ("bias", "masked_bias"):
                found |= {f"{owner}.{name}" for owner in ("attn", "attention", "self_attn")}
    return found
