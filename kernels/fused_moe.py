"""A mixture of gated experts on flat tokens."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from porter.kernels.act_and_mul import ACTIVATIONS, FUSED, act_and_mul, activate
from porter.kernels.backend import tl, triton, use_triton

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


@triton.jit  # type: ignore[untyped-decorator]
def _expert_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, out_ptr, order_ptr, experts_ptr, first_rows_ptr, ends_ptr,
    num_experts, out_features, in_features, stride_x, stride_expert, stride_weight, top_k,
    FIRST: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_M rows of one expert, rows being (token, choice) pairs in the order of experts.
    # FIRST gathers tokens, joins gate and up and leaves rows in that order; otherwise rows go back to their places.
    expert = tl.load(experts_ptr + tl.program_id(0))
    if expert < num_experts:
        rows = tl.load(first_rows_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
        live = rows < tl.load(ends_ptr + expert)
        places = tl.load(order_ptr + rows, mask=live, other=0)
        features = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        wanted = features < out_features
        columns = tl.arange(0, BLOCK_K)
        sources = places // top_k if FIRST else rows
        x_rows = x_ptr + sources[:, None].to(tl.int64) * stride_x
        weight_rows = weight_ptr + expert * stride_expert + features[None, :].to(tl.int64) * stride_weight
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, in_features, BLOCK_K):
            inside = start + columns < in_features
            # masked lanes hold 0 and add nothing
            x = tl.load(x_rows + start + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            both = inside[:, None] & wanted[None, :]
            w = tl.load(weight_rows + start + columns[:, None], mask=both, other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            if FIRST:
                up_rows = weight_rows + out_features * stride_weight
                u = tl.load(up_rows + start + columns[:, None], mask=both, other=0.0)
                second = tl.dot(x, u, second, input_precision="ieee")
        element = out_ptr.dtype.element_ty
        y = acc.to(element)
        targets = places
        if FIRST:
            # rounded where separate operations would round
            y = activate(y.to(tl.float32), ACT).to(element) * second.to(element)
            targets = rows.to(tl.int64)
        tl.store(out_ptr + targets[:, None] * out_features + features[None, :], y, mask=live[:, None] & wanted[None, :])


def _launch(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    hidden_act: str,
) -> torch.Tensor:
    num_rows, top_k, num_experts = top_k_index.numel(), top_k_index.shape[1], gate_up_proj.shape[0]
    block_m = 16 if num_rows <= 32 * num_experts else 64
    plan = _plan(top_k_index.flatten(), num_experts, block_m)
    hidden_states = hidden_states.contiguous()
    rows = (num_rows, down_proj.shape[2]), (num_rows, hidden_states.shape[1])
    inner, outputs = (torch.empty(shape, dtype=hidden_states.dtype, device=hidden_states.device) for shape in rows)
    for first, x, weight, out in ((True, hidden_states, gate_up_proj, inner), (False, inner, down_proj, outputs)):
        _expert_linear_kernel[(len(plan[1]), triton.cdiv(out.shape[1], 64))](
            x, weight, out, *plan, num_experts, out.shape[1], x.shape[1], x.stride(0), weight.stride(0),
            weight.stride(1), top_k, FIRST=first, ACT=FUSED[hidden_act], BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=64,
            num_warps=4, num_stages=4 if x.dtype.itemsize == 2 else 2,
        )  # fmt: skip
    weighted = outputs.view(-1, top_k, outputs.shape[1]) * top_k_weights[..., None]
    return weighted.sum(1).to(hidden_states.dtype)


def _plan(experts: torch.Tensor, num_experts: int, block_m: int) -> tuple[torch.Tensor, ...]:
    """experts `[rows]` -> (rows in the order of experts; each block's expert, num_experts for a spare one; its first
    row; each expert's end). Their sizes depend on shapes alone, so that nothing waits for the GPU."""
    order = experts.argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    ends = counts.cumsum(0)
    num_blocks = (counts + block_m - 1) // block_m
    last_blocks = num_blocks.cumsum(0)
    most = min(-(-len(experts) // block_m) + num_experts, len(experts))
    blocks = torch.arange(most, device=experts.device)
    owners = torch.searchsorted(last_blocks, blocks, right=True)
    known = owners.clamp(max=num_experts - 1)
    first_rows = (ends - counts)[known] + (blocks - (last_blocks - num_blocks)[known]) * block_m
    return order, owners, first_rows, ends


def fused_moe_stacked(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    hidden_act: str,
) -> torch.Tensor:
    """As fused_moe, with the experts' weights in stacks, see fused_moe_reference; on a GPU without waiting for it."""
    stacks = (gate_up_proj, down_proj)
    if hidden_act in FUSED and use_triton(hidden_states) and all(stack.stride(-1) == 1 for stack in stacks):
        return _launch(hidden_states, *stacks, top_k_index, top_k_weights, hidden_act)
    experts = len(gate_up_proj)
    weights = (gate_up_proj.unbind(), down_proj.unbind())
    return fused_moe(
        hidden_states, lambda e: (weights[0][e], weights[1][e]), experts, top_k_index, top_k_weights, hidden_act
    )


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
