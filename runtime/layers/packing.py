"""Weights in the layout that the CPU's matrix kernels read: decode steps, of few rows, are a third faster or more."""

import torch
from torch import nn

from porter.runtime.layers.embedding import ParallelLMHead
from porter.runtime.layers.linear import UNQUANTIZED, LinearBase


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this machine has packed kernels for `weight`."""
    if not weight.is_cpu or weight.is_mkldnn or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack_weights(model: nn.Module) -> None:
    """Repack every unquantized linear of a loaded model that from now on only serves.

    A packed weight keeps its shape and dtype but can be neither changed nor loaded again; `to_dense()` unpacks a copy.
    A head's weight that an embedding shares is packed as a copy.
    """
    for module in model.modules():
        if not isinstance(module, LinearBase | ParallelLMHead) or module.linear_method is not UNQUANTIZED:
            continue
        if can_pack(module.weight):
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), None)
            module.register_parameter("weight", nn.Parameter(packed, requires_grad=False))
