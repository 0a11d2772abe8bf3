"""What usually makes a module differ, told from its kind and from which tokens are wrong."""

import torch

_BY_KIND = {
    "MergedColumnParallelLinear": "a packed weight loaded into the wrong shard (gate and up swapped?) or a lost bias",
    "QKVParallelLinear": "q, k or v loaded into the wrong shard or head layout, or a lost bias",
    "ColumnParallelLinear": "a lost bias or a transposed weight",
    "RowParallelLinear": "a lost bias or a transposed weight",
    "ReplicatedLinear": "a lost bias or a transposed weight",
    "RMSNorm": "another eps, a lost (1 + weight), or another dtype inside the norm",
    "LayerNorm": "another eps, or weight and bias not loaded",
    "VocabParallelEmbedding": "embedding rows in the wrong place, a lost multiplier, or an offset of positions",
    "Embedding": "rows in the wrong place or an offset of positions",
    "ParallelLMHead": "a head tied or untied against the checkpoint, a lost bias or logit scale",
    "FusedMoE": "experts in the wrong order, or gate and up swapped",
}


def suggest(kind: str, has_attention: bool, token_errors: torch.Tensor, positions: torch.Tensor, limit: float) -> str:
    """A cause for a module that is wrong given the right input; errors and `positions` are by token.

    `has_attention`: whether the module itself holds an attention layer.
    """
    if kind in _BY_KIND:
        return _BY_KIND[kind]
    if not has_attention:
        return "its own arithmetic: the order of operations, a lost factor, or another activation"
    first_ok = bool((token_errors[positions == 0] <= limit).all())
    if not first_ok:
        return "v or the output projection: wrong already at position 0, where attention has one key"
    return _attention_cause(token_errors, positions, limit)


def _attention_cause(token_errors: torch.Tensor, positions: torch.Tensor, limit: float) -> str:
    wrong = positions[token_errors > limit]
    start = int(wrong.min()) if len(wrong) else 0
    if start > 2:
        return f"right up to position {start - 1}: a sliding window of another size, or a table that is too short"
    early, late = (float(token_errors[mask].mean()) for mask in _halves(positions))
    if late > 2 * early:
        return "grows with the position: rotary base, scaling or dimensions, or ALiBi slopes"
    return "about the same at all positions but 0: the score's scale, a softcap, q/k norms, or the head layout"


def _halves(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    middle = int(positions.max()) // 2
    return (positions > 0) & (positions <= middle), positions > middle
