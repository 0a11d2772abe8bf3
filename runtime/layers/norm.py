"""RMSNorm in the two conventions checkpoints use."""

from typing import Self

import torch
from torch import nn

from porter.kernels.rms_norm import add_rms_norm, rms_norm
from porter.kernels.rotate import HeadNorm
from porter.runtime.deferred import Deferred, Sum, can_defer, materialize


class RMSNorm(nn.Module):
    """weight * cast(x / rms(x)), computed in float32; with unit_offset cast((1 + weight) * x / rms(x))."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, unit_offset: bool = False) -> None:
        super().__init__()
        start = torch.zeros if unit_offset else torch.ones
        self.weight = nn.Parameter(start(hidden_size), requires_grad=False)
        self.eps = eps
        self.unit_offset = unit_offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, Sum) and x.is_pending:
            return x.apart(lambda a, b: add_rms_norm(a, b, self.weight, self.eps, self.unit_offset))
        x = materialize(x)
        if x.dim() == 3 and can_defer(x):
            return NormedHeads(x, HeadNorm(self.weight, self.eps, self.unit_offset))
        return rms_norm(x, self.weight, self.eps, self.unit_offset)


class NormedHeads(Deferred):
    """x `[T, heads, head_dim]`, each head normalised: attention does it while it loads them."""

    def __new__(cls, x: torch.Tensor, norm: HeadNorm) -> Self:
        return cls.like(x, tuple(x.shape))

    def __init__(self, x: torch.Tensor, norm: HeadNorm) -> None:
        super().__init__(x)
        self.heads = x
        self.head_norm = norm

    def compute(self) -> torch.Tensor:
        return rms_norm(self.heads, self.head_norm.weight, self.head_norm.eps, self.head_norm.unit_offset)


def split_norm(x: torch.Tensor) -> tuple[torch.Tensor, HeadNorm | None]:
    """x as (heads, the norm that is still to be applied to them)."""
    if isinstance(x, NormedHeads) and x.is_pending:
        x.check_inputs()
        return x.heads, x.head_norm
    return materialize(x), None
