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
_INT8_LINEAR = "pippppiii"  # with scales before the bias


def panel_linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x `[..., in]`, weight `[out, in]`, not packed, bias `[out]` -> `[..., out]`."""
    return F.linear(x, weight, bias)


def can_pack_panels(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether this machine has the kernel for `weight`, of the inputs' dtype or int8, and inputs in `dtype`."""
    fits = weight.is_cpu and weight.dtype in (dtype, torch.int8)
    return fits and cpu_function("linear", dtype, _LINEAR) is not None


def pack_panels(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight `[out, in]`, for which can_pack_panels says yes, as panels, one-dimensional."""
    rows, columns = weight.shape
    size = torch.zeros(1, dtype=torch.int64)
    _function("panel_elements", dtype, "iip")(rows, columns, size.data_ptr())
    packed = torch.empty(int(size), dtype=weight.dtype)
    weight = weight.contiguous()
    pack = "pack_int8_panels" if weight.dtype == torch.int8 else "pack_panels"
    _function(pack, dtype, "ppii")(weight.data_ptr(), packed.data_ptr(), rows, columns)
    return packed


def panel_linear(
    x: torch.Tensor,
    panels: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x `[..., in]`, pack_panels of a weight `[out_features, in]` for x's dtype -> `[..., out_features]`.

    bias `[out_features]` has x's dtype; scale `[out_features]`, of an int8 weight only, is float32.
    """
    if panels.dtype != (x.dtype if scale is None else torch.int8):
        raise TypeError(f"an input in {x.dtype} meets a weight in {panels.dtype}")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    num_rows, in_features = rows.shape
    y = torch.empty(num_rows, out_features, dtype=x.dtype)
    before = (rows.data_ptr(), rows.stride(0), panels.data_ptr())
    after = (0 if bias is None else bias.data_ptr(), y.data_ptr(), num_rows, out_features, in_features)
    if scale is None:
        _function("linear", x.dtype, _LINEAR)(*before, *after)
    else:
        _function("int8_linear", x.dtype, _INT8_LINEAR)(*before, scale.data_ptr(), *after)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def _function(name: str, dtype: torch.dtype, signature: str) -> CpuFunction:
    function = cpu_function(name, dtype, signature)
    assert function is not None, "can_pack_panels was not asked"
    return function
