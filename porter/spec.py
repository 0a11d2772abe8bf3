"""What was understood of a model, as data: what targets are written from besides the rewritten tree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from porter.analyze.facts import Facts, World
from porter.analyze.values import Layer
from porter.analyze.weights import Rules

ATTENTION = {"PagedAttention": "plain", "PagedAttentionWithRoPE": "rope", "PagedAttentionWithALiBi": "alibi"}
_OPTIONS = ("sliding_window", "softcap", "sinks", "rotary_dim", "interleaved", "bias_dtype")


@dataclass(frozen=True)
class AttentionSpec:
    """The attention layers at `path` ({i} is any index): their kind, and the options that they are given."""

    path: str
    kind: str  # "plain", "rope" or "alibi"
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """A model by the paths of its layers: `layers` maps a path to the runtime layer's class, or torch's.

    `requires` are values that a config must have for the port to be right.
    """

    architecture: str = ""
    attention: tuple[AttentionSpec, ...] = ()
    embedding: str = ""
    head: str = ""
    layers: dict[str, str] = field(default_factory=dict)
    weights: Rules = field(default_factory=Rules)
    requires: dict[str, Any] = field(default_factory=dict)


def describe(facts: Facts, weights: Rules) -> ModelSpec:
    """The spec of a model whose layers have been chosen."""
    found = {layer.path: layer for world in facts.worlds for layer in _layers(world)}
    classes = {path: _class(layer) for path, layer in sorted(found.items())}
    return ModelSpec(
        architecture=facts.entry.name,
        attention=tuple(_attention(found[path], kind) for path, kind in classes.items() if kind in ATTENTION),
        embedding=next((p for p, kind in classes.items() if kind == "VocabParallelEmbedding"), ""),
        head=next((p for p, kind in classes.items() if kind == "ParallelLMHead"), ""),
        layers=classes,
        weights=weights,
    )


def _layers(world: World) -> Iterator[Layer]:
    for values in world.values.values():
        for value in values:
            layer = value.attrs.get("layer")
            if isinstance(layer, Layer):
                yield layer


def _class(layer: Layer) -> str:
    return str(layer.attrs.get("class") or layer.kind)


def _attention(layer: Layer, kind: str) -> AttentionSpec:
    return AttentionSpec(layer.path, ATTENTION[kind], tuple(o for o in _OPTIONS if o in layer.params))
