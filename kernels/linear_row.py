"""A linear layer on one row: the batch-1 decode step, which does nothing but read weights."""

from typing import Any

import torch
import torch.nn.functional as F

from porter.kernels.act_and_mul import FUSED, act_and_mul_reference, activate
from porter.kernels.backend import dependent_launch, tl, triton, use_triton

CASES: list[dict[str, Any]] = [
    {"in_features": 64, "out_features": 48, "bias": True, "hidden_act": None},
    {"in_features": 33, "out_features": 65, "bias": False, "hidden_act": None},
    {"in_features": 1100, "out_features": 20, "bias": False, "hidden_act": "silu"},
    {"in_features": 96, "out_features": 37, "bias": True, "hidden_act": "gelu_pytorch_tanh"},
]


def linear_row_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    hidden_act: str | None = None,
) -> torch.Tensor:
    """x `[1, in]`, weight `[out, in]` (times scale `[out]`) -> `[1, out]`; hidden_act: act(first half) * second."""
    w = weight.float() if scale is None else weight.float() * scale[:, None]
    y = F.linear(x.float(), w, None if bias is None else bias.float()).to(x.dtype)
    return y if hidden_act is None else act_and_mul_reference(y, hidden_act)


@triton.jit  # type: ignore[untyped-decorator]
def _linear_row_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, scale_ptr, out_ptr, out_features, in_features, stride_weight,
    BIAS: tl.constexpr, SCALE: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    live = rows < out_features
    weight_rows = weight_ptr + rows[:, None].to(tl.int64) * stride_weight
    second_rows = weight_rows + out_features.to(tl.int64) * stride_weight
    # the first block of weights is on its way before x is ready
    first = live[:, None] & (columns < in_features)[None, :]
    w = tl.load(weight_rows + columns[None, :], mask=first, other=0.0, eviction_policy="evict_first")
    if GATED:
        u = tl.load(second_rows + columns[None, :], mask=first, other=0.0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + columns, mask=columns < in_features, other=0.0).to(tl.float32)
    acc = w.to(tl.float32) * x[None, :]
    second = acc
    if GATED:
        second = u.to(tl.float32) * x[None, :]
    for start in tl.range(BLOCK_K, in_features, BLOCK_K, num_stages=STAGES):
        inside = start + columns < in_features
        both = live[:, None] & inside[None, :]
        # masked lanes hold 0 and add nothing; a weight is read once, so it should not push others out of the cache
        x = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight_rows + start + columns[None, :], mask=both, other=0.0, eviction_policy="evict_first")
        acc += w.to(tl.float32) * x[None, :]
        if GATED:
            u = tl.load(second_rows + start + columns[None, :], mask=both, other=0.0, eviction_policy="evict_first")
            second += u.to(tl.float32) * x[None, :]
    y = tl.sum(acc, 1)
    if SCALE:
        y *= tl.load(scale_ptr + rows, mask=live, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + rows, mask=live, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(second, 1)
        if SCALE:
            up *= tl.load(scale_ptr + out_features + rows, mask=live, other=0.0)
        if BIAS:
            up += tl.load(bias_ptr + out_features + rows, mask=live, other=0.0).to(tl.float32)
        # rounded where separate operations would round
        gate = activate(y.to(out_ptr.dtype.element_ty).to(tl.float32), ACT).to(out_ptr.dtype.element_ty)
        y = gate.to(tl.float32) * up.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=live)


def _blocks(out_features: int, in_features: int, gated: bool) -> tuple[int, int, int, int]:
    """(BLOCK_N, BLOCK_K, warps, stages), measured on an H100: what reads weights of such a shape fastest."""
    if gated:
        return (8, 1024, 8, 3) if in_features >= 4096 else (8, 512, 4, 3)
    if out_features >= 65536:
        return 8, 512, 4, 1
    return 2, 1024, 4, 3 if in_features >= 8192 else 1


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    hidden_act: str | None,
) -> torch.Tensor:
    out_features = weight.shape[0] // (1 if hidden_act is None else 2)
    out = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype, device=x.device)
    block_n, block_k, warps, stages = _blocks(out_features, x.shape[-1], hidden_act is not None)
    _linear_row_kernel[(triton.cdiv(out_features, block_n),)](
        x.contiguous(), weight, bias, scale, out, out_features, x.shape[-1], weight.stride(0),
        BIAS=bias is not None, SCALE=scale is not None, GATED=hidden_act is not None,
        ACT=0 if hidden_act is None else FUSED[hidden_act],
        BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages, num_warps=warps,
        **dependent_launch(x),
    )  # fmt: skip
    return out


def can_fuse(x: torch.Tensor, weight: torch.Tensor, hidden_act: str | None = None) -> bool:
    """Whether `linear_row` runs its kernel on x `[..., in]`: one row, on a GPU."""
    known = hidden_act is None or hidden_act in FUSED
    return use_triton(x) and known and x.numel() == x.shape[-1] and weight.stride(-1) == 1


def linear_row(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    hidden_act: str | None = None,
) -> torch.Tensor:
    """x `[..., in]` of one row, weight `[out, in]`, scale float32 `[out]` of an 8-bit weight -> `[..., out]`.

    With hidden_act the outputs are halved: act(first half) * second half.
    """
    if can_fuse(x, weight, hidden_act):
        return _launch(x, weight, bias, scale, hidden_act)
    return linear_row_reference(x, weight, bias, scale, hidden_act)
