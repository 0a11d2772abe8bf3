"""ALiBi's slopes."""

import math

import torch


def get_alibi_slopes(num_heads: int) -> torch.Tensor:
    """float32 `[num_heads]`: 2^(-8i/n) for n the power of two below num_heads, then every other one of the next."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")
