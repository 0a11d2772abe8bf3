"""Between the projections and attention: normalise and rotate query and key, and store key and value in the cache."""

from typing import Any

import torch

from porter.kernels.backend import tl, triton, use_triton
from porter.kernels.rotate import (
    HeadNorm,
    Rotation,
    load_heads,
    norm_arguments,
    rotate_reference,
    rotation_arguments,
)
from porter.kernels.store_kv_cache import store_kv_cache_reference

CASES: list[dict[str, Any]] = [
    {"num_tokens": 1, "heads": (4, 2), "head_dim": 64, "rotary_dim": 64, "interleaved": False, "norm": None},
    {"num_tokens": 5, "heads": (3, 3), "head_dim": 80, "rotary_dim": 20, "interleaved": False, "norm": False},
    {"num_tokens": 3, "heads": (2, 1), "head_dim": 16, "rotary_dim": 16, "interleaved": True, "norm": True},
    {"num_tokens": 7, "heads": (20, 10), "head_dim": 24, "rotary_dim": 0, "interleaved": False, "norm": None},
]


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr"],
)
def _rotate_and_store_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, out_ptr, key_cache_ptr, value_cache_ptr,
    query_norm_ptr, key_norm_ptr, cos_ptr, sin_ptr, positions_ptr, slot_mapping_ptr,
    stride_query, stride_query_head, stride_key, stride_key_head, stride_value, stride_value_head,
    num_heads, num_kv_heads, head_dim, rotary_dim, query_eps, key_eps,
    QUERY_NORM: tl.constexpr, QUERY_OFFSET: tl.constexpr, KEY_NORM: tl.constexpr, KEY_OFFSET: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_H heads of one token; those of the query first, then of the key with the value's.
    token = tl.program_id(0).to(tl.int64)
    query_programs = tl.cdiv(num_heads, BLOCK_H)
    part = tl.program_id(1)
    position = tl.load(positions_ptr + token)
    dims = tl.arange(0, BLOCK_D)
    if part < query_programs:
        heads = part * BLOCK_H + tl.arange(0, BLOCK_H)
        live = heads < num_heads
        x = load_heads(
            query_ptr + token * stride_query, query_norm_ptr, cos_ptr, sin_ptr, heads, live, position,
            stride_query_head, head_dim, rotary_dim, query_eps, QUERY_NORM, QUERY_OFFSET, ROTATE, INTERLEAVED, BLOCK_D,
        )  # fmt: skip
        target = out_ptr + (token * num_heads + heads[:, None]) * head_dim + dims[None, :]
        tl.store(target, x, mask=live[:, None] & (dims < head_dim)[None, :])
    else:
        slot = tl.load(slot_mapping_ptr + token)
        if slot >= 0:
            heads = (part - query_programs) * BLOCK_H + tl.arange(0, BLOCK_H)
            live = heads < num_kv_heads
            x = load_heads(
                key_ptr + token * stride_key, key_norm_ptr, cos_ptr, sin_ptr, heads, live, position,
                stride_key_head, head_dim, rotary_dim, key_eps, KEY_NORM, KEY_OFFSET, ROTATE, INTERLEAVED, BLOCK_D,
            )  # fmt: skip
            inside = live[:, None] & (dims < head_dim)[None, :]
            place = (slot * num_kv_heads + heads[:, None]) * head_dim + dims[None, :]
            tl.store(key_cache_ptr + place, x.to(key_cache_ptr.dtype.element_ty), mask=inside)
            rows = value_ptr + token * stride_value + heads[:, None] * stride_value_head
            v = tl.load(rows + dims[None, :], mask=inside, other=0.0)
            tl.store(value_cache_ptr + place, v.to(value_cache_ptr.dtype.element_ty), mask=inside)


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    norms: tuple[HeadNorm | None, HeadNorm | None],
    rotation: Rotation | None,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    query_norm, query_eps = norm_arguments(norms[0])
    key_norm, key_eps = norm_arguments(norms[1])
    cos, sin, rotary_dim = rotation_arguments(rotation)
    block_h = 8
    if num_tokens:
        grid = (num_tokens, triton.cdiv(num_heads, block_h) + triton.cdiv(num_kv_heads, block_h))
        _rotate_and_store_kernel[grid](
            query, key, value, out, kv_cache[0], kv_cache[1], query_norm, key_norm, cos, sin, positions, slot_mapping,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            num_heads, num_kv_heads, head_dim, rotary_dim, query_eps, key_eps,
            QUERY_NORM=norms[0] is not None, QUERY_OFFSET=norms[0] is not None and norms[0].unit_offset,
            KEY_NORM=norms[1] is not None, KEY_OFFSET=norms[1] is not None and norms[1].unit_offset,
            ROTATE=rotation is not None, INTERLEAVED=rotation is not None and rotation.interleaved,
            BLOCK_H=block_h, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=2,
        )  # fmt: skip
    return out


def rotate_and_store_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    norms: tuple[HeadNorm | None, HeadNorm | None],
    rotation: Rotation | None,
) -> torch.Tensor:
    """As rotate_and_store, in plain torch."""
    key = rotate_reference(key, positions, norms[1], rotation)
    store_kv_cache_reference(key, value, kv_cache, slot_mapping)
    return rotate_reference(query, positions, norms[0], rotation)


def rotate_and_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    norms: tuple[HeadNorm | None, HeadNorm | None] = (None, None),
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """The query `[T, heads, head_dim]`, normalised and rotated; key and value `[T, kv_heads, head_dim]` go to
    slot_mapping `[T]` (-1 = nowhere) of kv_cache `[2, blocks, block_size, kv_heads, head_dim]`, the key treated
    likewise. norms: of the query and of the key."""
    run = _launch if use_triton(query) else rotate_and_store_reference
    return run(query, key, value, kv_cache, slot_mapping, positions, norms, rotation)
