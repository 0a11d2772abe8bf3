"""Root-mean-square normalisation over the last dimension, in float32."""

from typing import Any

import torch
import torch.nn.functional as F

from porter.kernels.backend import dependent_launch, tl, triton, use_triton
from porter.kernels.cpu_library import CpuFunction, cpu_function

CASES: list[dict[str, Any]] = [
    {"num_tokens": 1, "hidden_size": 64, "unit_offset": False},
    {"num_tokens": 7, "hidden_size": 80, "unit_offset": False},
    {"num_tokens": 3, "hidden_size": 129, "unit_offset": True},
]


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool = False) -> torch.Tensor:
    """x `[..., hidden]`, weight `[hidden]` -> same shape and dtype as x."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, out_ptr, stride_x, stride_out, eps, hidden_size,
    UNIT_OFFSET: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden_size
    # masked lanes hold 0 and add nothing to the sum of squares
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0)
    x32 = x.to(tl.float32)
    normed = x32 / tl.sqrt(tl.sum(x32 * x32, axis=0) / hidden_size + eps)
    y = normed * (1.0 + weight.to(tl.float32)) if UNIT_OFFSET else weight * normed.to(x.dtype)
    tl.store(out_ptr + row * stride_out + columns, y.to(x.dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, sum_ptr, out_ptr, stride_x, stride_residual, eps, hidden_size,
    UNIT_OFFSET: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden_size
    # masked lanes hold 0 and add nothing to the sum of squares
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + row * stride_residual + columns, mask=inside, other=0.0)
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    tl.store(sum_ptr + row * hidden_size + columns, total, mask=inside)
    x32 = total.to(tl.float32)
    normed = x32 / tl.sqrt(tl.sum(x32 * x32, axis=0) / hidden_size + eps)
    y = normed * (1.0 + weight.to(tl.float32)) if UNIT_OFFSET else weight * normed.to(x.dtype)
    tl.store(out_ptr + row * hidden_size + columns, y.to(x.dtype), mask=inside)


def _launch_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_size = x.shape[-1]
    rows, residual = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, residual))
    total, out = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    if rows.shape[0]:
        block = triton.next_power_of_2(hidden_size)
        _add_rms_norm_kernel[(rows.shape[0],)](
            rows, residual, weight, total, out, rows.stride(0), residual.stride(0), eps, hidden_size,
            UNIT_OFFSET=unit_offset, BLOCK=block, num_warps=8 if block >= 4096 else 4, **dependent_launch(x),
        )  # fmt: skip
    return out, total


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual) of x and residual `[T, hidden]`, in one pass over memory."""
    if use_triton(x):
        return _launch_add(x, residual, weight, eps, unit_offset)
    total = x + residual
    return rms_norm(total, weight, eps, unit_offset), total


def _launch(x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
    hidden_size = x.shape[-1]
    rows = x.reshape(-1, hidden_size)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if rows.shape[0]:
        _rms_norm_kernel[(rows.shape[0],)](
            rows, weight, out, rows.stride(0), out.stride(0), eps, hidden_size,
            UNIT_OFFSET=unit_offset, BLOCK=triton.next_power_of_2(hidden_size), **dependent_launch(x),
        )  # fmt: skip
    return out.view(x.shape)


def _on_cpu(function: CpuFunction, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: bool) -> torch.Tensor:
    hidden_size = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, hidden_size)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    function(
        rows.data_ptr(), rows.stride(0), weight.data_ptr(), out.data_ptr(), rows.shape[0], hidden_size, eps, offset
    )
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool = False) -> torch.Tensor:
    """x `[..., hidden]` normalised and scaled by weight `[hidden]` (or 1 + weight); dtype of x."""
    if use_triton(x):
        return _launch(x, weight, eps, unit_offset)
    function = cpu_function("rms_norm", x.dtype, "pippiifi") if x.is_cpu and weight.dtype == x.dtype else None
    if function is not None:
        return _on_cpu(function, x, weight, eps, unit_offset)
    if x.dtype == torch.float32 and not unit_offset:
        return F.rms_norm(x, weight.shape, weight, eps)
    return rms_norm_reference(x, weight, eps, unit_offset)
