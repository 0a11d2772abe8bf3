"""RMSNorm in the two conventions checkpoints use."""

import torch
from torch import nn

from porter.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """weight * cast(x / rms(x)), computed in float32; with unit_offset cast((1 + weight) * x / rms(x))."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, unit_offset: bool = False) -> None:
        super().__init__()
        start = torch.zeros if unit_offset else torch.ones
        self.weight = nn.Parameter(start(hidden_size), requires_grad=False)
        self.eps = eps
        self.unit_offset = unit_offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, self.unit_offset)
