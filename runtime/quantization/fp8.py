"""Weight-only fp8 (e4m3): products are in the inputs' dtype. For checkpoints in floats, not for those stored in fp8."""

import torch

from porter.kernels.scaled_linear import FP8, quantize_fp8
from porter.runtime.layers.scaled import ScaledLinearMethod


class Fp8LinearMethod(ScaledLinearMethod):
    """As ScaledLinearMethod, in fp8."""

    dtype = FP8

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_fp8(weight)


METHOD = Fp8LinearMethod()
