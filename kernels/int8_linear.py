"""Linear with int8 weights and one scale per output channel."""

from typing import Any

import torch

from porter.kernels.scaled_linear import scaled_linear

# up to so many rows the fused kernel wins
_FEW_ROWS = 8

CASES: list[dict[str, Any]] = [
    {"num_tokens": 1, "in_features": 64, "out_features": 48, "bias": True},
    {"num_tokens": 2, "in_features": 96, "out_features": 32, "bias": False},
    {"num_tokens": 7, "in_features": 33, "out_features": 65, "bias": False},
]


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight `[..., out, in]` -> int8 of the same shape and float32 scales `[..., out]`; weight ~ int8 * scale."""
    weight = weight.float()
    scale = weight.abs().amax(-1).clamp(min=1e-12) / 127
    return (weight / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x `[..., in]`, int8 weight `[out, in]`, scale `[out]` -> `[..., out]` in x's dtype."""
    if _decodes_fast(x, weight):
        y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight, scale.to(x.dtype))
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    return scaled_linear(x, weight, scale, bias)


def _decodes_fast(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's fused CPU kernel is safe (it reads whole vectors) and faster than converting the weight."""
    return (
        x.is_cpu
        and x.dtype == torch.bfloat16
        and 0 < x.numel() <= _FEW_ROWS * x.shape[-1]
        and weight.shape[0] % 32 == 0
        and weight.shape[1] % 32 == 0
    )
