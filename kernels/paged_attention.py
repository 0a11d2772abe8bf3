"""Causal attention of a step's queries over the paged cache: prefill, chunked prefill and decode in one operation."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionTraits:
    """What varies between models; counts are this rank's."""

    scaling: float
    sliding_window: int | None = None  # a query sees this many keys, itself included
    softcap: float | None = None  # cap * tanh(score / cap), before the mask
    alibi_dtype: torch.dtype | None = None  # slope and key position are multiplied in it; None: float32


@dataclass(frozen=True)
class PagedBatch:
    """Which cache blocks each sequence reads and where its queries lie; see AttentionMetadata for the shapes."""

    block_tables: torch.Tensor
    context_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    max_seqlen_q: int
    max_context_len: int


def _alibi_bias(slopes: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    dtype = dtype or torch.float32
    return (slopes.to(dtype)[:, None] * positions.to(dtype)).float()


def paged_attention_reference(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: PagedBatch,
    traits: AttentionTraits,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """query `[T, heads, head_dim]`, kv_cache `[2, blocks, block_size, kv_heads, head_dim]` -> like query."""
    out = torch.empty_like(query)
    bounds = batch.cu_seqlens_q.tolist()
    for i, context in enumerate(batch.context_lens.tolist()):
        rows = slice(bounds[i], bounds[i + 1])
        q = query[rows].float()
        blocks = batch.block_tables[i, : -(-context // kv_cache.shape[2])].long()
        k, v = kv_cache[:, blocks].flatten(1, 2)[:, :context].float()
        group = query.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * traits.scaling
        key_pos = torch.arange(context, device=query.device)
        if alibi_slopes is not None:
            scores += _alibi_bias(alibi_slopes, key_pos, traits.alibi_dtype)[:, None]
        if traits.softcap is not None:
            scores = traits.softcap * torch.tanh(scores / traits.softcap)
        query_pos = key_pos[context - q.shape[0] :, None]
        hidden = key_pos > query_pos
        if traits.sliding_window is not None:
            hidden |= key_pos <= query_pos - traits.sliding_window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            extra = sinks.float()[:, None, None].expand(-1, q.shape[0], 1)
            weights = torch.cat((scores, extra), dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v).to(query.dtype)
    return out


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: PagedBatch,
    traits: AttentionTraits,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """query `[T, heads, head_dim]`, kv_cache `[2, blocks, block_size, kv_heads, head_dim]` -> like query."""
    return paged_attention_reference(query, kv_cache, batch, traits, sinks, alibi_slopes)
