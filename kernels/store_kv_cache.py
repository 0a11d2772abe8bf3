"""Writing a step's keys and values into their slots of the paged cache."""

from typing import Any

import torch

CASES: list[dict[str, Any]] = [
    {"num_tokens": 1, "num_kv_heads": 1, "head_dim": 8, "block_size": 4, "num_blocks": 2},
    {"num_tokens": 13, "num_kv_heads": 3, "head_dim": 80, "block_size": 16, "num_blocks": 5},
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


def store_kv_cache(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Store key and value `[T, kv_heads, head_dim]` at slot_mapping `[T]` (-1 = don't) of kv_cache
    `[2, num_blocks, block_size, kv_heads, head_dim]`."""
    store_kv_cache_reference(key, value, kv_cache, slot_mapping)
