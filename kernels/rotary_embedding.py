"""Rotation of the leading dimensions of each head by cos and sin."""

from typing import Any

import torch

CASES: list[dict[str, Any]] = [
    {"num_tokens": 1, "num_heads": 4, "head_dim": 64, "rotary_dim": 64, "interleaved": False},
    {"num_tokens": 5, "num_heads": 3, "head_dim": 80, "rotary_dim": 20, "interleaved": False},
    {"num_tokens": 3, "num_heads": 2, "head_dim": 16, "rotary_dim": 8, "interleaved": True},
]


def rotary_embedding_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """x `[T, heads, head_dim]`; cos, sin `[T, rotary_dim]`, halves equal (pair i's angle is column i)."""
    rotary_dim = cos.shape[-1]
    half = rotary_dim // 2
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    first, second = (
        (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.split_with_sizes([half, half], dim=-1)
    )
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((joined, passed), dim=-1)


def rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """x `[T, heads, head_dim]` with its first cos.shape[-1] dimensions rotated: halves, or even/odd pairs."""
    return rotary_embedding_reference(x, cos, sin, interleaved)
