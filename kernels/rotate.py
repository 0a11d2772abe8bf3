"""What a head goes through before attention, inside other kernels: normalisation and rotation of a block of heads."""

from dataclasses import dataclass

import torch

from porter.kernels.backend import tl, triton


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm over head_dim of each head, see rms_norm: weight `[head_dim]`."""

    weight: torch.Tensor
    eps: float
    unit_offset: bool


@dataclass(frozen=True)
class Rotation:
    """cos and sin of every position `[max_position, rotary_dim // 2]`, and whether pairs are even/odd or halves."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool


@triton.jit  # type: ignore[untyped-decorator]
def load_heads(  # type: ignore[no-untyped-def]
    row_ptr, norm_ptr, cos_ptr, sin_ptr, heads, live, position, stride_head, head_dim, rotary_dim, eps,
    NORM: tl.constexpr, UNIT_OFFSET: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`[len(heads), BLOCK_D]` of one token's heads, in their dtype; 0 where a head is not live or past head_dim."""
    dims = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (dims < head_dim)[None, :]
    rows = row_ptr + heads[:, None] * stride_head
    x = tl.load(rows + dims[None, :], mask=inside, other=0.0)
    shrink = tl.zeros_like(heads).to(tl.float32) + 1.0
    if NORM:
        x32 = x.to(tl.float32)
        shrink = 1.0 / tl.sqrt(tl.sum(x32 * x32, 1) / head_dim + eps)
        x = _normed(x, norm_ptr + dims, dims < head_dim, shrink, UNIT_OFFSET)
    if ROTATE:
        turned = dims < rotary_dim
        half = rotary_dim // 2
        if INTERLEAVED:
            partner, pair, sign = dims + 1 - 2 * (dims % 2), dims // 2, tl.where(dims % 2 == 0, -1.0, 1.0)
        else:
            partner, pair, sign = (dims + half) % rotary_dim, dims % half, tl.where(dims < half, -1.0, 1.0)
        partner = tl.where(turned, partner, dims)
        other = tl.load(rows + partner[None, :], mask=inside, other=0.0)
        if NORM:
            other = _normed(other, norm_ptr + partner, dims < head_dim, shrink, UNIT_OFFSET)
        # dimensions that are not rotated have cos 1 and sin 0
        cos = tl.load(cos_ptr + position * half + pair, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + position * half + pair, mask=turned, other=0.0).to(tl.float32) * sign
        x = (x.to(tl.float32) * cos[None, :] + other.to(tl.float32) * sin[None, :]).to(x.dtype)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _normed(x, weights, inside, shrink, UNIT_OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    weight = tl.load(weights, mask=inside, other=0.0)
    normed = x.to(tl.float32) * shrink[:, None]
    if UNIT_OFFSET:
        y = (normed * (1.0 + weight.to(tl.float32))[None, :]).to(x.dtype)
    else:
        y = weight[None, :] * normed.to(x.dtype)
    return y


def norm_arguments(norm: HeadNorm | None) -> tuple[torch.Tensor | None, float]:
    """(weight, eps) as the kernels take them."""
    return (None, 0.0) if norm is None else (norm.weight, norm.eps)


def rotation_arguments(rotation: Rotation | None) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """(cos, sin, rotary_dim) as the kernels take them."""
    return (None, None, 2) if rotation is None else (rotation.cos, rotation.sin, 2 * rotation.cos.shape[1])


def rotate_reference(
    x: torch.Tensor, positions: torch.Tensor, norm: HeadNorm | None, rotation: Rotation | None
) -> torch.Tensor:
    """x `[T, heads, head_dim]` normalised, then rotated by positions `[T]`."""
    from porter.kernels.rms_norm import rms_norm_reference
    from porter.kernels.rotary_embedding import rotary_embedding_reference

    if norm is not None:
        x = rms_norm_reference(x, norm.weight, norm.eps, norm.unit_offset)
    if rotation is not None:
        cos, sin = (table[positions].repeat(1, 2) for table in (rotation.cos, rotation.sin))
        x = rotary_embedding_reference(x, cos, sin, rotation.interleaved)
    return x
