"""The CPU path of attention where every sequence has one query: keys and values are read where they lie."""

import torch

from porter.kernels.cpu_library import cpu_function

# query, its row stride, keys, values, block tables, their row stride, context lengths, out, sequences, heads, KV heads,
# head_dim, block size, window, scale
_SIGNATURE = "pipppippiiiiiif"
# a multiple of the lanes of any machine's vectors
_LANES = 16


def can_decode(query: torch.Tensor, kv_cache: torch.Tensor, max_seqlen_q: int) -> bool:
    """Whether this machine has the kernel for these, with nothing done to the scores but scaling and a window."""
    fits = max_seqlen_q == 1 and query.shape[2] % _LANES == 0 and query.dtype == kv_cache.dtype
    return fits and cpu_function("decode_attention", query.dtype, _SIGNATURE) is not None


def decode_attention_cpu(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """query `[num_seqs, heads, head_dim]`, kv_cache `[2, blocks, block_size, kv_heads, head_dim]`, block_tables int32
    `[num_seqs, max_blocks]`, context_lens int32 `[num_seqs]` -> like query; for what `can_decode`."""
    num_seqs, heads, head_dim = query.shape
    _, _, block_size, kv_heads, _ = kv_cache.shape
    query = query if query.stride()[1:] == (head_dim, 1) else query.contiguous()
    tables, contexts = block_tables.contiguous(), context_lens.contiguous()
    out = torch.empty(query.shape, dtype=query.dtype)
    keys = kv_cache.data_ptr()
    function = cpu_function("decode_attention", query.dtype, _SIGNATURE)
    assert function is not None, "can_decode was not asked"
    function(
        query.data_ptr(), query.stride(0), keys, keys + kv_cache.stride(0) * kv_cache.itemsize,
        tables.data_ptr(), tables.shape[1], contexts.data_ptr(), out.data_ptr(),
        num_seqs, heads, kv_heads, head_dim, block_size, window or 0, scaling,
    )  # fmt: skip
    return out
