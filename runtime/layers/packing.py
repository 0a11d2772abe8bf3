"""Weights in the layout that the CPU's matrix kernels read: decode steps, of few rows, are a third faster or more."""

import torch
from torch import nn

from porter.kernels.panel_linear import can_pack_panels, pack_panels, panel_linear
from porter.runtime.layers.embedding import ParallelLMHead
from porter.runtime.layers.linear import UNQUANTIZED, LinearBase, LinearMethod
from porter.runtime.quantization.int8 import Int8LinearMethod


class PanelMethod(LinearMethod):
    """One layer's weight as panels, one-dimensional, with the scales of an int8 one: porter's own kernel."""

    def __init__(self, out_features: int) -> None:
        self.out_features = out_features

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x `[..., in]` -> `[..., out]`."""
        scale: torch.Tensor | None = getattr(layer, "weight_scale", None)
        return panel_linear(x, layer.weight, self.out_features, bias, scale)  # type: ignore[arg-type]


class MkldnnMethod(LinearMethod):
    """A weight that oneDNN has packed; it keeps its shape and dtype, and `to_dense()` unpacks a copy."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x `[..., in]` -> `[..., out]`."""
        packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, bias, "none", [], "")
        return packed


def can_pack_mkldnn(weight: torch.Tensor) -> bool:
    """Whether this machine has packed kernels of oneDNN for `weight`."""
    if not weight.is_cpu or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack_weights(model: nn.Module) -> None:
    """Repack every linear of a loaded model that from now on only serves, where there is a kernel for it.

    A packed weight can be neither changed nor loaded again. A head's weight that an embedding shares is packed as a
    copy.
    """
    for module in model.modules():
        if isinstance(module, LinearBase | ParallelLMHead):
            weight, method = _packed(module)
            if method is not None:
                module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
                module.linear_method = method


def _packed(layer: LinearBase | ParallelLMHead) -> tuple[torch.Tensor, LinearMethod | None]:
    weight = layer.weight.detach()
    if layer.linear_method is not UNQUANTIZED and not isinstance(layer.linear_method, Int8LinearMethod):
        return weight, None
    dtype: torch.dtype = getattr(layer, "params_dtype", weight.dtype)
    if can_pack_panels(weight, dtype):
        return pack_panels(weight, dtype), PanelMethod(weight.shape[0])
    if layer.linear_method is UNQUANTIZED and can_pack_mkldnn(weight):
        return torch.ops.mkldnn._reorder_linear_weight(weight, None), MkldnnMethod()
    return weight, None
