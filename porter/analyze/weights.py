"""The weight rules of a port: what its checkpoints call the tensors, and how they hold them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import libcst as cst

from porter.analyze.facts import Facts, World
from porter.analyze.program import Program, full_name
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
    return Rules(
        packed={k: dict(v) for k, v in notes.get("packed", {}).items()},
        fused=dict(notes.get("fused", {})),
        transposed=tuple(sorted(notes.get("transposed", ()))),
        tied=_tied(after.worlds[0]),
        renames=_renames(source, after),
        skip=_skipped(before, after),
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
                _plain(str(e.value.evaluated_value)) for e in node.elements if isinstance(e.value, cst.SimpleString)
            }
    for cls in before.classes.values():
        init = cls.methods.get("__init__")
        if init is not None:
            found |= _buffers(init.node)
    return tuple(sorted(f for f in found if f))


def _plain(pattern: str) -> str:
    """A regular expression of transformers as a dotted name, if it is one."""
    text = pattern.replace(r"\.", ".").strip("^$").removeprefix(".*").strip(".")
    return text if all(part.isidentifier() for part in text.split(".")) else ""


def _buffers(init: cst.FunctionDef) -> set[str]:
    """Names given to register_buffer for masks and biases that old checkpoints carry."""
    found: set[str] = set()
    for node in _calls(init):
        if (
            full_name(node.func) == "self.register_buffer"
            and node.args
            and isinstance(node.args[0].value, cst.SimpleString)
        ):
            name = str(node.args[0].value.evaluated_value)
            if name in ("bias", "masked_bias"):
                found |= {f"{owner}.{name}" for owner in ("attn", "attention", "self_attn")}
    return found


def _calls(node: cst.CSTNode) -> list[cst.Call]:
    own = [node] if isinstance(node, cst.Call) else []
    return own + [c for child in node.children for c in _calls(child)]


# -- transformers' own renames ---------------------------------------------------------------------


def _renames(source: Source, after: Facts) -> dict[str, str]:
    """Renames between a model's checkpoints and the installed transformers' modules, read from its mapping as text.

    They hold for the names of the installed file; an old file still has the checkpoints' own names.
    """
    path = _mapping_file()
    if path is None or source.model_type is None:
        return {}
    known = {
        segment
        for w in after.worlds
        for v in w.values.values()
        for x in v
        if (layer := x.attrs.get("layer")) is not None
        for segment in str(layer.path).split(".")
    }
    pairs = _mapping(path, after.entry.name) or _mapping(path, source.model_type)
    return {old: new for old, new in pairs if new.split(".")[-1] in known and old.split(".")[-1] not in known}


def _mapping_file() -> Path | None:
    from porter.errors import SourceError
    from porter.source import models_folder

    try:
        path = models_folder().parent / "conversion_mapping.py"
    except SourceError:
        return None
    return path if path.is_file() else None


def _mapping(path: Path, key: str) -> list[tuple[str, str]]:
    """The plain renames of a class or model type in transformers' conversion_mapping.py."""
    tree = cst.parse_module(path.read_text(encoding="utf-8"))
    aliases: dict[str, str] = {}
    entries: dict[str, cst.BaseExpression] = {}
    _collect(tree, aliases, entries)
    node = entries.get(key) or entries.get(aliases.get(key, ""))
    if node is None:
        return []
    found = []
    for call in _calls(node):
        if full_name(call.func) == "WeightRenaming":
            pair = _pair(call)
            if pair is not None:
                found.append(pair)
    return found


def _collect(node: cst.CSTNode, aliases: dict[str, str], entries: dict[str, cst.BaseExpression]) -> None:
    if isinstance(node, cst.DictElement) and isinstance(node.key, cst.SimpleString):
        key = str(node.key.evaluated_value)
        if isinstance(node.value, cst.SimpleString):
            aliases[key] = str(node.value.evaluated_value)
        elif isinstance(node.value, cst.List):
            entries.setdefault(key, node.value)
    for child in node.children:
        _collect(child, aliases, entries)


def _pair(call: cst.Call) -> tuple[str, str] | None:
    values = []
    for arg in call.args[:2]:
        node = (
            arg.value.elements[0].value
            if isinstance(arg.value, cst.List) and len(arg.value.elements) == 1
            else arg.value
        )
        if not isinstance(node, cst.SimpleString):
            return None
        text = _plain(str(node.evaluated_value))
        if not text:
            return None
        values.append(text)
    return (values[0], values[1]) if len(values) == 2 else None
