"""Rotation of the leading dimensions of each head by cos and sin."""

from typing import Any

import torch

from porter.kernels.backend import tl, triton, use_triton

Tables = tuple[torch.Tensor, torch.Tensor]

CASES: list[dict[str, Any]] = [
    {"num_tokens": 1, "heads": (4, 2), "head_dim": 64, "rotary_dim": 64, "interleaved": False},
    {"num_tokens": 5, "heads": (3, 3), "head_dim": 80, "rotary_dim": 20, "interleaved": False},
    {"num_tokens": 3, "heads": (2, 1), "head_dim": 16, "rotary_dim": 16, "interleaved": True},
    {"num_tokens": 7, "heads": (5, 1), "head_dim": 24, "rotary_dim": 8, "interleaved": True},
]


def rotary_embedding_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """x `[T, heads, head_dim]`; cos, sin `[T, rotary_dim]`, halves equal (pair i's angle is column i)."""
    rotary_dim = cos.shape[-1]
    half = rotary_dim // 2
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    pieces = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    first, second = (rotated[..., piece] for piece in pieces)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((joined, passed), dim=-1)


def rotary_tables(cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> Tables:
    """What dimension i and its partner are multiplied with, `[T, 1, rotary_dim]`: cos, and sin with its sign."""
    half = cos.shape[-1] // 2
    if interleaved:
        cos, sin = (x[:, :half].repeat_interleave(2, dim=-1) for x in (cos, sin))
    sign = torch.ones(2 * half, dtype=sin.dtype, device=sin.device)
    sign[slice(0, None, 2) if interleaved else slice(0, half)] = -1
    return cos[:, None], (sin * sign)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _rotary_embedding_kernel(  # type: ignore[no-untyped-def]
    x_ptr, cos_ptr, sin_ptr, out_ptr, stride_token, stride_head, num_heads, head_dim, rotary_dim,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK)
    inside = dims < head_dim
    turned = dims < rotary_dim
    half = rotary_dim // 2
    swapped = dims + 1 - 2 * (dims % 2) if INTERLEAVED else (dims + half) % rotary_dim
    partner = tl.where(turned, swapped, dims)
    row = x_ptr + token * stride_token + head * stride_head
    # masked lanes hold 0 and are not stored; dimensions that are not rotated have cos 1 and sin 0
    x = tl.load(row + dims, mask=inside, other=0.0)
    other = tl.load(row + partner, mask=inside, other=0.0)
    cos = tl.load(cos_ptr + token * rotary_dim + dims, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + token * rotary_dim + dims, mask=turned, other=0.0)
    y = x.to(tl.float32) * cos.to(tl.float32) + other.to(tl.float32) * sin.to(tl.float32)
    tl.store(out_ptr + (token * num_heads + head) * head_dim + dims, y.to(x.dtype), mask=inside)


def _launch(x: torch.Tensor, tables: Tables, interleaved: bool) -> torch.Tensor:
    num_tokens, num_heads, head_dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = (table.contiguous() for table in tables)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_tokens:
        _rotary_embedding_kernel[(num_tokens, num_heads)](
            x, cos, sin, out, x.stride(0), x.stride(1), num_heads, head_dim, cos.shape[-1],
            INTERLEAVED=interleaved, BLOCK=triton.next_power_of_2(head_dim),
        )  # fmt: skip
    return out


def _rotate(x: torch.Tensor, tables: Tables, interleaved: bool) -> torch.Tensor:
    if use_triton(x):
        return _launch(x, tables, interleaved)
    cos, sin = tables
    rotary_dim = cos.shape[-1]
    turned = x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]
    if interleaved:
        partner = turned.reshape(*turned.shape[:2], -1, 2).flip(-1).flatten(-2)
    else:
        partner = turned.roll(rotary_dim // 2, -1)
    y = torch.addcmul(turned * cos, partner, sin)
    return y if turned is x else torch.cat((y, x[..., rotary_dim:]), dim=-1)


def _joined(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Query and key heads as one tensor, if they are neighbours in the rows of a packed projection."""
    width = query.shape[1] * query.shape[2]
    strides = query.stride()
    if (
        key.stride() != strides
        or strides[1] != query.shape[2]
        or key.storage_offset() != query.storage_offset() + width
        or key.untyped_storage().data_ptr() != query.untyped_storage().data_ptr()
    ):
        return None
    return query.as_strided((query.shape[0], query.shape[1] + key.shape[1], query.shape[2]), strides)


def rotary_embedding(
    query: torch.Tensor, key: torch.Tensor, tables: Tables, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """query, key `[T, heads, head_dim]` with their first rotary_dim dimensions rotated: halves, or even/odd pairs.

    tables: rotary_tables(cos, sin, interleaved), of the step.
    """
    both = _joined(query, key)
    if both is None:
        return _rotate(query, tables, interleaved), _rotate(key, tables, interleaved)
    both = _rotate(both, tables, interleaved)
    return both[:, : query.shape[1]], both[:, query.shape[1] :]
