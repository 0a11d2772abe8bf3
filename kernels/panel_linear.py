"""Linear on the CPU with weights packed into panels, which the kernel in cpu/linear.cpp reads in order."""

from typing import Any

import torch
import torch.nn.functional as F

from porter.kernels.cpu_library import CpuFunction, cpu_function

CASES: list[dict[str, Any]] = [
    {"num_tokens": tokens, "in_features": inputs, "out_features": outputs, "bias": bias}
    for tokens, inputs, outputs, bias in [
        (0, 16, 16, True),
        (1, 33, 50, True),
        (9, 64, 48, False),
        (16, 2500, 97, True),
        (131, 40, 7, False),
    ]
]
# x, its row stride, the panels, bias, y, rows of x, outputs, inputs
_LINEAR = "pipppiii"


def panel_linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x `[..., in]`, weight `[out, in]`, not packed, bias `[out]` -> `[..., out]`."""
    return F.linear(x, weight, bias)


def can_pack_panels(weight: torch.Tensor) -> bool:
    """Whether this machine has the kernel for `weight`."""
    return weight.is_cpu and cpu_function("linear", weight.dtype, _LINEAR) is not None


def pack_panels(weight: torch.Tensor) -> torch.Tensor:
    """weight `[out, in]`, of a kind that can_pack_panels, as panels, one-dimensional."""
    rows, columns = weight.shape
    size = torch.zeros(1, dtype=torch.int64)
    _function("panel_elements", weight.dtype, "iip")(rows, columns, size.data_ptr())
    packed = torch.empty(int(size), dtype=weight.dtype)
    weight = weight.contiguous()
    _function("pack_panels", weight.dtype, "ppii")(weight.data_ptr(), packed.data_ptr(), rows, columns)
    return packed


def panel_linear(
    x: torch.Tensor, panels: torch.Tensor, out_features: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x `[..., in]`, pack_panels of a weight `[out_features, in]` and a bias of x's dtype -> `[..., out_features]`."""
    if x.dtype != panels.dtype:
        raise TypeError(f"an input in {x.dtype} meets a weight in {panels.dtype}")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    num_rows, in_features = rows.shape
    y = torch.empty(num_rows, out_features, dtype=x.dtype)
    _function("linear", x.dtype, _LINEAR)(
        rows.data_ptr(), rows.stride(0), panels.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        num_rows, out_features, in_features,
    )  # fmt: skip
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def _function(name: str, dtype: torch.dtype, signature: str) -> CpuFunction:
    function = cpu_function(name, dtype, signature)
    assert function is not None, "can_pack_panels was not asked"
    return function
