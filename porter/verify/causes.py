"""What probably makes a module wrong, with the evidence for it: signatures of its error, settings tried, positions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from porter.verify.signatures import Evidence, explain
from porter.verify.trials import rotation_differs, tried

_BY_KIND = {
    "MergedColumnParallelLinear": "a packed weight loaded into the wrong shard, or a lost bias",
    "QKVParallelLinear": "q, k or v loaded into the wrong shard or head layout, or a lost bias",
    "ColumnParallelLinear": "a weight loaded wrongly (transposed?) or a lost bias",
    "RowParallelLinear": "a weight loaded wrongly (transposed?) or a lost bias",
    "ReplicatedLinear": "a weight loaded wrongly (transposed?) or a lost bias",
    "RMSNorm": "another eps, a lost (1 + weight), or another dtype inside the norm",
    "LayerNorm": "another eps, or weight and bias not loaded",
    "VocabParallelEmbedding": "embedding rows in the wrong place, a lost multiplier, or an offset of positions",
    "Embedding": "rows in the wrong place or an offset of positions",
    "ParallelLMHead": "a head tied or untied against the checkpoint, a lost bias or logit scale",
    "FusedMoE": "experts in the wrong order, gate and up exchanged, or another activation",
}


@dataclass(frozen=True)
class Culprit:
    """A module of the port that is wrong by itself, the original's counterpart, both whole models, and how to run
    it again on the original's input (its error, None if that can't be done)."""

    module: nn.Module
    original: nn.Module
    port: nn.Module
    reference: nn.Module
    rerun: Callable[[], float | None]


def suggest(culprit: Culprit, found: Evidence) -> str:
    """A cause in words, the first of those that have evidence."""
    attention = next(_attention_of(culprit.module), None)
    if attention is None:
        return explain(found) or _plain(culprit.module, found.kind)
    error = float(found.token_errors.max())
    return (
        rotation_differs(attention, culprit.reference)
        or tried(attention, culprit.original, error, culprit.rerun)
        or explain(found)
        or _by_position(found)
    )


def _attention_of(module: nn.Module) -> Iterator[Any]:
    """The attention layer directly in `module`: a block of several modules has causes of its own."""
    return (child for child in module.children() if hasattr(child, "cache_shape"))


def _plain(module: nn.Module, kind: str) -> str:
    if kind in _BY_KIND:
        return _BY_KIND[kind]
    if "Norm" in kind:
        return _BY_KIND["RMSNorm"]
    if "Expert" in kind:
        return _BY_KIND["FusedMoE"]
    parts = [kind, *(type(child).__name__ for child in module.children())]
    if any(word in part for part in parts for word in ("MoE", "Expert", "Router")):
        return "how experts are chosen and weighted: router, softmax and top-k, normalisation, a shared expert"
    if any(hasattr(child, "cache_shape") for child in module.modules()):
        activation = ", another activation" if any(part.endswith("Linear") for part in parts) else ""
        return (
            f"how its parts are put together: a residual, norm and residual in order, a lost factor or norm{activation}"
        )
    return "its own arithmetic: another activation, a lost factor or term, the order of operations"


def _by_position(found: Evidence) -> str:
    errors, positions = found.token_errors, found.positions
    if not bool((errors[positions == 0] <= found.limit).all()):
        return (
            "wrong already at position 0, where attention has one key: v (exchanged with k?), key-value heads given to "
            "other query heads, sinks, or the output projection"
        )
    wrong = positions[errors > found.limit]
    start = int(wrong.min()) if len(wrong) else 0
    if start > 2:
        return f"right up to position {start - 1}: a sliding window, rounded rotary positions, or a table that is short"
    return "right at position 0 only: rotary positions or pairs, the score's scale, a softcap, q/k norms, or the heads"
