"""Writing a step's keys and values into their slots of the paged cache."""

from typing import Any

import torch

from porter.kernels.backend import tl, triton, use_triton

CASES: list[dict[str, Any]] = [
    {"num_tokens": 1, "num_kv_heads": 1, "head_dim": 8, "block_size": 4, "num_blocks": 2},
    {"num_tokens": 13, "num_kv_heads": 3, "head_dim": 80, "block_size": 16, "num_blocks": 5},
    {"num_tokens": 40, "num_kv_heads": 2, "head_dim": 33, "block_size": 8, "num_blocks": 6},
]


def store_kv_cache_reference(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Row t of key and value `[T, kv_heads, head_dim]` goes to slot slot_mapping[t]; a slot of -1 is dropped."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    flat = kv_cache.view(2, -1, *kv_cache.shape[3:])
    flat[0, slots] = key[kept].to(kv_cache.dtype)
    flat[1, slots] = value[kept].to(kv_cache.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _store_kv_cache_kernel(  # type: ignore[no-untyped-def]
    key_ptr, value_ptr, cache_ptr, slot_mapping_ptr,
    stride_key, stride_value, stride_side, width, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if slot >= 0:
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        # masked lanes hold 0 and are not stored
        key = tl.load(key_ptr + token * stride_key + columns, mask=inside, other=0.0)
        value = tl.load(value_ptr + token * stride_value + columns, mask=inside, other=0.0)
        target = cache_ptr + slot * width + columns
        tl.store(target, key.to(cache_ptr.dtype.element_ty), mask=inside)
        tl.store(target + stride_side, value.to(cache_ptr.dtype.element_ty), mask=inside)


def _launch(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    width = key.shape[1] * key.shape[2]
    key, value = key.reshape(-1, width), value.reshape(-1, width)
    if slot_mapping.shape[0]:
        _store_kv_cache_kernel[(slot_mapping.shape[0],)](
            key, value, kv_cache, slot_mapping, key.stride(0), value.stride(0), kv_cache.stride(0), width,
            BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip


def store_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    all_stored: bool = False,
) -> None:
    """Store key and value `[T, kv_heads, head_dim]` at slot_mapping `[T]` (-1 = don't) of kv_cache
    `[2, num_blocks, block_size, kv_heads, head_dim]`. all_stored: the caller knows that no slot is -1."""
    if use_triton(key):
        _launch(key, value, kv_cache, slot_mapping)
    elif all_stored and key.dtype == kv_cache.dtype:
        slots = kv_cache.view(2, -1, *kv_cache.shape[3:])
        slots[0].index_copy_(0, slot_mapping, key)
        slots[1].index_copy_(0, slot_mapping, value)
    else:
        store_kv_cache_reference(key, value, kv_cache, slot_mapping)
