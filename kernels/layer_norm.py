"""An addition and the layer normalisation behind it, over the last dimension, in float32."""

from typing import Any

import torch
import torch.nn.functional as F

from porter.kernels.backend import dependent_launch, tl, triton, use_triton

CASES: list[dict[str, Any]] = [
    {"num_tokens": 1, "hidden_size": 64, "weight": True, "bias": True},
    {"num_tokens": 7, "hidden_size": 80, "weight": True, "bias": False},
    {"num_tokens": 3, "hidden_size": 129, "weight": False, "bias": False},
]


def add_layer_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(x + residual), x + residual) of x and residual `[T, hidden]`; weight and bias `[hidden]`."""
    total = x + residual
    scale, shift = (None if t is None else t.float() for t in (weight, bias))
    return F.layer_norm(total.float(), [total.shape[-1]], scale, shift, eps).to(x.dtype), total


@triton.jit  # type: ignore[untyped-decorator]
def _add_layer_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, stride_x, stride_residual, eps, hidden_size,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden_size
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + row * stride_residual + columns, mask=inside, other=0.0)
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    tl.store(sum_ptr + row * hidden_size + columns, total, mask=inside)
    x32 = total.to(tl.float32)
    # masked lanes hold 0 and add nothing to either sum
    centred = tl.where(inside, x32 - tl.sum(x32, axis=0) / hidden_size, 0.0)
    y = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / hidden_size + eps)
    if WEIGHT:
        y *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * hidden_size + columns, y.to(x.dtype), mask=inside)


def _launch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_size = x.shape[-1]
    rows, residual = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, residual))
    total, out = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    if rows.shape[0]:
        block = triton.next_power_of_2(hidden_size)
        _add_layer_norm_kernel[(rows.shape[0],)](
            rows, residual, weight, bias, total, out, rows.stride(0), residual.stride(0), eps, hidden_size,
            WEIGHT=weight is not None, BIAS=bias is not None, BLOCK=block, num_warps=8 if block >= 4096 else 4,
            **dependent_launch(x),
        )  # fmt: skip
    return out, total


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As add_layer_norm_reference; on a GPU in one pass over memory."""
    return (_launch if use_triton(x) else add_layer_norm_reference)(x, residual, weight, bias, eps)
