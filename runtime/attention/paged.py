"""Attention over the paged KV cache: plain, with RoPE, with ALiBi. Head counts are this rank's."""

import torch
import torch.nn.functional as F
from torch import nn

from porter.kernels.backend import use_triton
from porter.kernels.decode_attention import decode_attention
from porter.kernels.paged_attention import AttentionTraits, PagedBatch, paged_attention
from porter.kernels.rotary_embedding import Tables, rotary_embedding, rotary_tables
from porter.kernels.rotate import Rotation
from porter.kernels.rotate_and_store import rotate_and_store
from porter.kernels.rotate_and_store_cpu import can_rotate_and_store, rotate_and_store_cpu
from porter.kernels.store_kv_cache import store_kv_cache
from porter.runtime.deferred import materialize
from porter.runtime.errors import ConfigError
from porter.runtime.layers.norm import split_norm
from porter.runtime.layers.rope import RopeParameters, RotaryEmbedding
from porter.runtime.layers.sharding import shard_parameter
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.parallel import get_tp_rank, get_tp_size

# measured on an H100
_FEW_SEQUENCES = 64


class PagedAttention(nn.Module):
    """Causal attention of new tokens over all cached ones, with the traits that models differ in."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        *,
        num_kv_heads: int | None = None,
        v_head_dim: int | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = head_dim
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.cache_dim = max(self.head_dim, self.v_head_dim)  # the narrower of key and value is padded with zeros
        if num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads = {num_heads} does not divide by num_kv_heads = {num_kv_heads}", "check the model's config"
            )
        self.traits = AttentionTraits(scaling, sliding_window, softcap)
        self.alibi_slopes: torch.Tensor | None = None
        if sinks is not None and len(sinks) != num_heads:  # there is one for each head of ALL ranks
            sinks.data = sinks.data[:num_heads].clone()
            shard_parameter(sinks)
        # Kept out of the parameters: the port registers and names it.
        self._sinks = [] if sinks is None else [sinks]

    def cache_shape(self, num_blocks: int, block_size: int) -> tuple[int, int, int, int, int]:
        """The shape of this layer's kv_cache, which must start out finite (zeros): unwritten slots are read, masked."""
        return 2, num_blocks, block_size, self.num_kv_heads, self.cache_dim

    def forward(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads * head_dim] or [num_tokens, num_heads, head_dim]
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`[num_tokens, num_heads * v_head_dim]`; key and value are stored in kv_cache first."""
        if use_triton(value):
            return self._on_gpu(attn_metadata.slot_mapping, query, key, value, kv_cache, attn_metadata)
        query = self._padded(query.reshape(-1, self.num_heads, self.head_dim))
        key = self._padded(key.reshape(-1, self.num_kv_heads, self.head_dim))
        value = self._padded(value.reshape(-1, self.num_kv_heads, self.v_head_dim))
        batch, all_stored = attn_metadata.once("batch", lambda: _batch(attn_metadata))
        store_kv_cache(key, value, kv_cache, attn_metadata.slot_mapping, all_stored)
        return self._attend(query, kv_cache, batch)

    def _attend(self, query: torch.Tensor, kv_cache: torch.Tensor, batch: PagedBatch) -> torch.Tensor:
        """`[num_tokens, num_heads * v_head_dim]`, for keys and values that are stored."""
        sinks = self._sinks[0] if self._sinks else None
        out = paged_attention(query, kv_cache, batch, self.traits, sinks, self.alibi_slopes)
        return out[..., : self.v_head_dim].reshape(-1, self.num_heads * self.v_head_dim)

    def _padded(self, heads: torch.Tensor) -> torch.Tensor:
        missing = self.cache_dim - heads.shape[-1]
        return F.pad(heads, (0, missing)) if missing else heads

    def _on_gpu(
        self,
        positions: torch.Tensor,  # not read without a rotation
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        m: AttentionMetadata,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """A few decoding sequences in one kernel each layer. Of many, heads are prepared once, not by each program that
        works on a sequence; what else is in the step is attended to apart."""
        fused = self.cache_dim == self.head_dim  # else heads are padded, after their norm
        query, query_norm = split_norm(query) if fused else (materialize(query), None)
        key, key_norm = split_norm(key) if fused else (materialize(key), None)
        query = self._padded(query.reshape(-1, self.num_heads, self.head_dim))
        key = self._padded(key.reshape(-1, self.num_kv_heads, self.head_dim))
        value = self._padded(value.reshape(-1, self.num_kv_heads, self.v_head_dim))
        norms, extras = (query_norm, key_norm), (self._sinks[0] if self._sinks else None, self.alibi_slopes)
        n = m.num_decodes
        first, others = m.once("batches", lambda: (_part(m, slice(0, n)), _part(m, slice(n, None))))
        arguments = (kv_cache, m.slot_mapping, positions)
        num_seqs = len(m.context_lens)
        if n == num_seqs <= _FEW_SEQUENCES:
            out = decode_attention(query, key, value, *arguments, first, self.traits, norms, rotation, *extras)
        else:
            query = rotate_and_store(query, key, value, *arguments, norms, rotation)
            out = torch.empty_like(query)
            if n < num_seqs:
                paged_attention(query, kv_cache, others, self.traits, *extras, out=out)
            if n:
                ready = (query[:n], key[:n], value[:n])
                decode_attention(*ready, *arguments, first, self.traits, (None, None), None, *extras, out=out[:n])
        return out[..., : self.v_head_dim].reshape(-1, self.num_heads * self.v_head_dim)


def _part(m: AttentionMetadata, seqs: slice) -> PagedBatch:
    bounds = m.cu_seqlens_q[seqs.start :]
    return PagedBatch(m.block_tables[seqs], m.context_lens[seqs], bounds, m.max_seqlen_q, m.max_context_len)


def _batch(m: AttentionMetadata) -> tuple[PagedBatch, bool]:
    """The kernels' view of the step, and whether every token is stored (not asked of a GPU, which would wait)."""
    batch = PagedBatch(m.block_tables, m.context_lens, m.cu_seqlens_q, m.max_seqlen_q, m.max_context_len)
    return batch, m.slot_mapping.is_cpu and bool((m.slot_mapping >= 0).all())


_rotary_embeddings: dict[str, RotaryEmbedding] = {}


def _get_rotary_embedding(
    rope_parameters: RopeParameters, head_dim: int, max_position: int, rotary_dim: int | None
) -> RotaryEmbedding:
    """One embedding for all layers that rotate alike, so that a step computes cos and sin once."""
    rope = RotaryEmbedding(rope_parameters, head_dim, max_position, rotary_dim)
    key = f"{rope.inv_freq.tolist()} {rope.attention_scaling}"
    return _rotary_embeddings.setdefault(key, rope)


class PagedAttentionWithRoPE(PagedAttention):
    """Rotates query and key by their positions first: halves of the first rotary_dim dimensions, or even/odd pairs.

    A layer whose rope_parameters are None does not rotate: models mix layers with and without RoPE.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        *,
        rope_parameters: RopeParameters | None,
        max_position: int,
        num_kv_heads: int | None = None,
        v_head_dim: int | None = None,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: nn.Parameter | None = None,
    ) -> None:
        super().__init__(
            num_heads,
            head_dim,
            scaling,
            num_kv_heads=num_kv_heads,
            v_head_dim=v_head_dim,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
        )
        self.interleaved = interleaved
        self.rotary_emb = (
            None
            if rope_parameters is None
            else _get_rotary_embedding(rope_parameters, head_dim, max_position, rotary_dim)
        )

    def forward(  # type: ignore[override]
        self,
        positions: torch.Tensor,  # [num_tokens]
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`[num_tokens, num_heads * head_dim]`; the rotated key is what the cache holds."""
        rope = self.rotary_emb
        if rope is None:
            return super().forward(query, key, value, kv_cache, attn_metadata)
        if use_triton(value) and self.cache_dim == self.head_dim:
            cos, sin = rope.tables(attn_metadata.max_context_len, query.dtype, query.device)
            rotation = Rotation(cos, sin, self.interleaved)
            return self._on_gpu(positions, query, key, value, kv_cache, attn_metadata, rotation)
        tables = attn_metadata.once(
            (id(rope), query.dtype, self.interleaved),
            lambda: self._tables(rope, positions, query.dtype),
        )
        plain = not self.interleaved and self.head_dim == self.v_head_dim == self.cache_dim
        if plain and can_rotate_and_store(value, kv_cache):
            query = rotate_and_store_cpu(query, key, value, tables, kv_cache, attn_metadata.slot_mapping)
            batch, _ = attn_metadata.once("batch", lambda: _batch(attn_metadata))
            return self._attend(query, kv_cache, batch)
        query = query.reshape(-1, self.num_heads, self.head_dim)
        key = key.reshape(-1, self.num_kv_heads, self.head_dim)
        query, key = rotary_embedding(query, key, tables, self.interleaved)
        return super().forward(query, key, value, kv_cache, attn_metadata)

    def _tables(self, rope: RotaryEmbedding, positions: torch.Tensor, dtype: torch.dtype) -> Tables:
        cos, sin = rope(positions, dtype)
        return rotary_tables(cos, sin, self.interleaved)


class PagedAttentionWithALiBi(PagedAttention):
    """Adds slope * key position to each score. alibi_slopes: float32, one per head of ALL ranks."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        *,
        alibi_slopes: torch.Tensor,
        num_kv_heads: int | None = None,
        bias_dtype: torch.dtype | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__(
            num_heads,
            head_dim,
            scaling,
            num_kv_heads=num_kv_heads,
            sliding_window=sliding_window,
            softcap=softcap,
        )
        total = num_heads * get_tp_size()
        if alibi_slopes.shape != (total,):
            raise ConfigError(f"expected {total} ALiBi slopes, found {tuple(alibi_slopes.shape)}", "pass one per head")
        self.traits = AttentionTraits(scaling, sliding_window, softcap, bias_dtype)
        # Not a buffer: a cast of the model must not round it.
        self.alibi_slopes = alibi_slopes[get_tp_rank() * num_heads :][:num_heads].float()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`[num_tokens, num_heads * head_dim]`."""
        if self.alibi_slopes is not None and self.alibi_slopes.device != query.device:
            self.alibi_slopes = self.alibi_slopes.to(query.device)
        return super().forward(query, key, value, kv_cache, attn_metadata)
