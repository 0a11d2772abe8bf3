"""Weight-only int8."""

import torch

from porter.kernels.int8_linear import int8_linear, quantize_int8
from porter.runtime.layers.scaled import ScaledLinearMethod


class Int8LinearMethod(ScaledLinearMethod):
    """As ScaledLinearMethod, in int8."""

    dtype = torch.int8

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_int8(weight)

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return int8_linear(x, weight, scale, bias)


METHOD = Int8LinearMethod()
