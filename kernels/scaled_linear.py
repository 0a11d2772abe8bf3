"""Linear with weights of 8 bits, int8 or fp8 (e4m3), and one float32 scale per output channel."""

from typing import Any

import torch
import torch.nn.functional as F

from porter.kernels.backend import dependent_launch, tl, triton, use_triton

FP8 = torch.float8_e4m3fn
# beyond so many rows arithmetic is what takes time: better to convert the weight for the library's product
_MOST_ROWS = 512

CASES: list[dict[str, Any]] = [
    {"num_tokens": 2, "in_features": 64, "out_features": 48, "bias": True},
    {"num_tokens": 17, "in_features": 100, "out_features": 35, "bias": False},
    {"num_tokens": 70, "in_features": 33, "out_features": 130, "bias": True},
]


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight `[..., out, in]` -> fp8 of the same shape and float32 scales `[..., out]`; weight ~ fp8 * scale."""
    weight = weight.float()
    scale = weight.abs().amax(-1).clamp(min=1e-12) / torch.finfo(FP8).max
    return (weight / scale[..., None]).to(FP8), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The float weight `[..., out, in]` that an 8-bit `weight` and `scale` `[..., out]` stand for."""
    return (weight.float() * scale[..., None]).to(dtype)


def scaled_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x `[..., in]`, weight `[out, in]`, scale `[out]` -> `[..., out]`."""
    return F.linear(x, dequantize(weight, scale, x.dtype), bias)


@triton.jit  # type: ignore[untyped-decorator]
def _scaled_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, num_rows, out_features, in_features, stride_x, stride_weight,
    BIAS: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    live, wanted = rows < num_rows, features < out_features
    x_rows = x_ptr + rows[:, None].to(tl.int64) * stride_x
    weight_rows = weight_ptr + features[:, None].to(tl.int64) * stride_weight
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, in_features, BLOCK_K):
        inside = start + columns < in_features
        # masked lanes hold 0 and add nothing
        x = tl.load(x_rows + start + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        w = tl.load(weight_rows + start + columns[None, :], mask=wanted[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="ieee")
    y = acc * tl.load(scale_ptr + features, mask=wanted, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + features, mask=wanted, other=0.0).to(tl.float32)[None, :]
    target = out_ptr + rows[:, None].to(tl.int64) * out_features + features[None, :]
    tl.store(target, y.to(out_ptr.dtype.element_ty), mask=live[:, None] & wanted[None, :])


def _tile(num_rows: int, out_features: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages), measured on an H100."""
    if num_rows <= 16:
        return 16, 32, 256, 4, 4
    if num_rows <= 64:
        return 64, 64, 64, 4, 4
    return (128, 128, 64, 8, 4) if out_features >= 8192 else (128, 32, 128, 4, 3)


def _launch(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    num_rows, out_features = rows.shape[0], weight.shape[0]
    out = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    if num_rows:
        block_m, block_n, block_k, warps, stages = _tile(num_rows, out_features)
        _scaled_linear_kernel[(triton.cdiv(out_features, block_n), triton.cdiv(num_rows, block_m))](
            rows, weight, scale, bias, out, num_rows, out_features, x.shape[-1], rows.stride(0), weight.stride(0),
            BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n,
            BLOCK_K=block_k if x.dtype.itemsize == 2 else 32, num_warps=warps, num_stages=stages, **dependent_launch(x),
        )  # fmt: skip
    return out.view(*x.shape[:-1], out_features)


def scaled_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As scaled_linear_reference; on a GPU up to some rows without a converted copy of the weight."""
    if use_triton(x) and weight.stride(-1) == 1 and x.numel() <= _MOST_ROWS * x.shape[-1]:
        return _launch(x, weight, scale, bias)
    y = F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
    return y if bias is None else y + bias
