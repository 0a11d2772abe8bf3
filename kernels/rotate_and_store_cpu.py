"""The CPU path from projections to attention: rotate query and key by halves, store key and value in the cache."""

import torch

from porter.kernels.cpu_library import cpu_function
from porter.kernels.rotary_embedding import Tables

# query, key and value with their row strides, cos, sin, out, key and value cache, slots, tokens, heads, KV heads,
# head_dim, rotary_dim
_SIGNATURE = "pipipippppppiiiii"


def can_rotate_and_store(value: torch.Tensor, kv_cache: torch.Tensor) -> bool:
    """Whether this machine has the kernel for values and a cache like these."""
    same = value.is_cpu and value.dtype == kv_cache.dtype
    return same and cpu_function("rotate_and_store", value.dtype, _SIGNATURE) is not None


def rotate_and_store_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tables: Tables,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """The turned query `[T, heads, head_dim]`; key and value go to their slots, -1 = nowhere.

    query `[T, heads * head_dim]`, key and value `[T, kv_heads * head_dim]`, or with heads apart; tables:
    rotary_tables(cos, sin) of these tokens; kv_cache `[2, blocks, block_size, kv_heads, head_dim]`.
    """
    kv_heads, head_dim = kv_cache.shape[3:]
    query, key, value = _rows(query), _rows(key), _rows(value)
    num_tokens, width = query.shape
    cos, sin = (table.contiguous() for table in tables)
    out = torch.empty(num_tokens, width // head_dim, head_dim, dtype=query.dtype)
    keys = kv_cache.data_ptr()
    function = cpu_function("rotate_and_store", query.dtype, _SIGNATURE)
    assert function is not None, "can_rotate_and_store was not asked"
    function(
        query.data_ptr(), query.stride(0), key.data_ptr(), key.stride(0), value.data_ptr(), value.stride(0),
        cos.data_ptr(), sin.data_ptr(), out.data_ptr(), keys, keys + kv_cache.stride(0) * kv_cache.itemsize,
        slot_mapping.data_ptr(), num_tokens, width // head_dim, kv_heads, head_dim, cos.shape[-1],
    )  # fmt: skip
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    rows = x if x.dim() == 2 else x.flatten(1)
    return rows if rows.stride(1) == 1 else rows.contiguous()
