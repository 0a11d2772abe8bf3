"""A mixture of gated experts on flat tokens."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from porter.kernels.act_and_mul import ACTIVATIONS, act_and_mul

ExpertWeights = Callable[[int], tuple[torch.Tensor, torch.Tensor]]

CASES: list[dict[str, Any]] = [
    {"num_tokens": 1, "num_experts": 4, "top_k": 2, "hidden_size": 16, "intermediate_size": 24},
    {"num_tokens": 9, "num_experts": 8, "top_k": 3, "hidden_size": 20, "intermediate_size": 12},
    {"num_tokens": 6, "num_experts": 3, "top_k": 1, "hidden_size": 8, "intermediate_size": 8},
]


def fused_moe_reference(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    hidden_act: str,
) -> torch.Tensor:
    """Every expert on every token, then the sum over each token's chosen ones.

    hidden_states `[T, H]`, gate_up_proj `[E, 2I, H]`, down_proj `[E, H, I]`, top_k_* `[T, k]` -> `[T, H]`.
    """
    gate, up = torch.einsum("th,eih->tei", hidden_states, gate_up_proj).chunk(2, dim=-1)
    outputs = torch.einsum("tei,ehi->teh", ACTIVATIONS[hidden_act](gate) * up, down_proj)
    chosen = outputs.gather(1, top_k_index[..., None].expand(-1, -1, outputs.shape[-1]))
    return (chosen * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)


def fused_moe(
    hidden_states: torch.Tensor,
    weights: ExpertWeights,
    num_experts: int,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    hidden_act: str,
) -> torch.Tensor:
    """hidden_states `[T, H]`, top_k_* `[T, k]` -> `[T, H]`; weights(e) gives expert e's gate_up and down matrices.

    Tokens are grouped by expert, so that an expert nobody chose costs nothing.
    """
    top_k = top_k_index.shape[1]
    order = top_k_index.flatten().argsort()
    counts = top_k_index.flatten().bincount(minlength=num_experts).tolist()
    rows = hidden_states[order // top_k]
    outputs = torch.empty_like(rows)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            gate_up, down = weights(expert)
            inner = act_and_mul(F.linear(rows[start : start + count], gate_up), hidden_act)
            outputs[order[start : start + count]] = F.linear(inner, down)
            start += count
    weighted = outputs.view(-1, top_k, rows.shape[-1]) * top_k_weights[..., None]
    return weighted.sum(1).to(hidden_states.dtype)
