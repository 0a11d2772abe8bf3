"""Causal attention of a step's queries over the paged cache: prefill, chunked prefill and decode in one operation."""

from dataclasses import dataclass, field
from typing import Any

import torch

from porter.kernels.backend import tl, triton, use_triton
from porter.kernels.decode_attention_cpu import can_decode, decode_attention_cpu
from porter.kernels.paged_attention_cpu import CpuPlan, cpu_attention

# (query_len, context_len) of each sequence; block_size 8 makes the odd lengths end inside a block
_SHAPES: dict[str, list[tuple[int, int]]] = {
    "prefill": [(5, 5), (17, 17)],
    "chunked": [(3, 19), (16, 24)],
    "decode": [(1, 1), (1, 8), (1, 33)],
    "mixed": [(1, 21), (7, 7), (1, 9), (4, 40)],
}
_TRAITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 6},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "alibi_bfloat16": {"alibi": True, "alibi_dtype": torch.bfloat16},
    "alibi_float16": {"alibi": True, "alibi_dtype": torch.float16},
    "all": {"sliding_window": 11, "softcap": 5.0, "sinks": True, "alibi": True},
}
CASES: list[dict[str, Any]] = [
    {"shape": shape, "lens": lens, "heads": heads, "traits": traits}
    for shape, lens in _SHAPES.items()
    for traits, heads in zip(
        _TRAITS,
        [(4, 4, 16), (6, 2, 24), (3, 1, 16), (8, 2, 16), (4, 4, 16), (4, 2, 8), (4, 1, 8), (5, 5, 20)],
        strict=True,
    )
]


@dataclass(frozen=True)
class AttentionTraits:
    """What varies between models; counts are this rank's."""

    scaling: float
    sliding_window: int | None = None  # a query sees this many keys, itself included
    softcap: float | None = None  # cap * tanh(score / cap), before the mask
    alibi_dtype: torch.dtype | None = None  # slope and key position are multiplied in it; None: float32


@dataclass(frozen=True)
class PagedBatch:
    """Which cache blocks each sequence reads and where its queries lie; see AttentionMetadata for the shapes.

    One object serves all layers of a step, so that what they have in common is worked out once.
    """

    block_tables: torch.Tensor
    context_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    max_seqlen_q: int
    max_context_len: int
    cpu_plans: dict[tuple[int, int | None], CpuPlan] = field(default_factory=dict, repr=False, compare=False)

    def cpu_plan(self, block_size: int, window: int | None) -> CpuPlan:
        """What the CPU path reads for layers with this window."""
        key = (block_size, window)
        if key not in self.cpu_plans:
            self.cpu_plans[key] = CpuPlan.make(
                self.block_tables, self.context_lens.tolist(), self.cu_seqlens_q.tolist(), block_size, window
            )
        return self.cpu_plans[key]


def alibi_bias(slopes: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """slopes `[heads]`, key positions `[...]` -> float32 `[heads, ...]`, the product rounded to dtype."""
    dtype = dtype or torch.float32
    return (slopes.to(dtype).view(-1, *[1] * positions.dim()) * positions.to(dtype)).float()


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
            scores += alibi_bias(alibi_slopes, key_pos, traits.alibi_dtype)[:, None]
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


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    acc, total, highest, query, query_pos, slope, begin, end, context_len,
    key_ptr, value_ptr, table_ptr, stride_block, stride_slot, scaling, softcap, window, head_dim, block_size,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr,
    ALIBI_DTYPE: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # The online softmax over keys begin to end; without MASKED every query sees all of them.
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < head_dim
    for start in range(begin, end, BLOCK_N):
        key_pos = start + tl.arange(0, BLOCK_N)
        if MASKED:
            cached = key_pos < context_len
            # lanes past the context point at block 0 and are masked out of every load
            block = tl.load(table_ptr + key_pos // block_size, mask=cached, other=0)
            readable = cached[:, None] & in_head[None, :]
        else:
            block = tl.load(table_ptr + key_pos // block_size)
            readable = in_head[None, :]
        slot = block.to(tl.int64) * stride_block + (key_pos % block_size) * stride_slot
        key = tl.load(key_ptr + slot[:, None] + dims[None, :], mask=readable, other=0.0)
        value = tl.load(value_ptr + slot[:, None] + dims[None, :], mask=readable, other=0.0)
        if UPCAST:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        # exponentials to base 2 are what the hardware has
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scaling * 1.4426950408889634)
        if ALIBI:
            # a float32 product of two rounded numbers is exact: rounding it is multiplying in ALIBI_DTYPE
            bias = slope[:, None] * key_pos[None, :].to(tl.float32).to(ALIBI_DTYPE).to(tl.float32)
            scores += bias.to(ALIBI_DTYPE).to(tl.float32) * 1.4426950408889634
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1), which saturates without overflowing to NaN
            inner = scores / (softcap * 1.4426950408889634)
            scores = softcap * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))
        if MASKED:
            visible = cached[None, :] & (key_pos[None, :] <= query_pos[:, None])
            if WINDOW:
                visible = visible & (key_pos[None, :] > query_pos[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # a row that has seen no key yet keeps -inf; subtract 0 there instead of making NaN
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        highest = new_highest
    return acc, total, highest


# What a step's batch decides is not specialised on, or kernels would be compiled while serving
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["stride_table"],
    do_not_specialize_on_alignment=["block_tables_ptr", "context_lens_ptr", "cu_seqlens_q_ptr"],
)
def _paged_attention_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, out_ptr, sinks_ptr, slopes_ptr,
    block_tables_ptr, context_lens_ptr, cu_seqlens_q_ptr,
    stride_query_token, stride_query_head, stride_out_token, stride_out_head,
    stride_block, stride_slot, stride_kv_head, stride_table,
    scaling, softcap, window, group, head_dim, block_size,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr,
    ALIBI_DTYPE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_M (token, head) pairs of one sequence that share a KV head, over all keys they see.
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    # the last queries see the most keys: they start first
    first_row = (tl.num_programs(2) - 1 - tl.program_id(2)) * BLOCK_M
    query_start = tl.load(cu_seqlens_q_ptr + sequence)
    query_len = tl.load(cu_seqlens_q_ptr + sequence + 1) - query_start
    if first_row < query_len * group:
        context_len = tl.load(context_lens_ptr + sequence)
        rows = first_row + tl.arange(0, BLOCK_M)
        live = rows < query_len * group
        token = rows // group
        head = kv_head * group + rows % group
        query_pos = context_len - query_len + token
        dims = tl.arange(0, BLOCK_D)
        inside = live[:, None] & (dims < head_dim)[None, :]
        query_offset = (query_start + token).to(tl.int64) * stride_query_token + head * stride_query_head
        # masked lanes hold 0: they add nothing to a score and are not stored
        query = tl.load(query_ptr + query_offset[:, None] + dims[None, :], mask=inside, other=0.0)
        if UPCAST:
            query = query.to(tl.float32)
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if SINKS:
            highest = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
            total += 1.0
        slope = highest
        if ALIBI:
            slope = tl.load(slopes_ptr + head, mask=live, other=0.0).to(ALIBI_DTYPE).to(tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        first_pos = context_len - query_len + first_row // group
        last_pos = tl.minimum(context_len, context_len - query_len + (first_row + BLOCK_M - 1) // group + 1)
        begin = 0
        common = (first_pos + 1) // BLOCK_N * BLOCK_N
        if WINDOW:
            begin = tl.maximum(first_pos - window + 1, 0) // BLOCK_N * BLOCK_N
            common = begin
        keys = key_ptr + kv_head * stride_kv_head
        values = value_ptr + kv_head * stride_kv_head
        table = block_tables_ptr + sequence.to(tl.int64) * stride_table
        acc, total, highest = _attend(
            acc, total, highest, query, query_pos, slope, begin, common, context_len, keys, values, table,
            stride_block, stride_slot, scaling, softcap, window, head_dim, block_size,
            False, SOFTCAP, WINDOW, ALIBI, ALIBI_DTYPE, UPCAST, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        acc, total, highest = _attend(
            acc, total, highest, query, query_pos, slope, common, last_pos, context_len, keys, values, table,
            stride_block, stride_slot, scaling, softcap, window, head_dim, block_size,
            True, SOFTCAP, WINDOW, ALIBI, ALIBI_DTYPE, UPCAST, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_offset = (query_start + token).to(tl.int64) * stride_out_token + head * stride_out_head
        tl.store(out_ptr + out_offset[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


def _tiles(rows: int, row_bytes: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages), measured on an H100."""
    # few sizes: each is compiled
    if row_bytes > 256:
        return 16 if rows <= 32 else 64, 32, 4, 2
    if rows <= 32:
        return 16, 64, 4, 2
    return (256, 64, 8, 3) if row_bytes == 256 else (128, 64, 8, 2)


def _launch(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: PagedBatch,
    traits: AttentionTraits,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[3], kv_cache.shape[2]
    query = query if query.stride(-1) == 1 else query.contiguous()
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    group = num_heads // num_kv_heads
    rows = batch.max_seqlen_q * group
    num_seqs = batch.context_lens.shape[0]
    if rows == 0 or num_seqs == 0:
        return out
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m, block_n, warps, stages = _tiles(rows, block_d * query.element_size())
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    _paged_attention_kernel[(num_seqs, num_kv_heads, triton.cdiv(rows, block_m))](
        query, kv_cache[0], kv_cache[1], out, sinks, alibi_slopes,
        batch.block_tables, batch.context_lens, batch.cu_seqlens_q,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        kv_cache.stride(1), kv_cache.stride(2), kv_cache.stride(3), batch.block_tables.stride(0),
        traits.scaling, traits.softcap or 1.0, traits.sliding_window or 0, group, head_dim, block_size,
        SOFTCAP=traits.softcap is not None, WINDOW=traits.sliding_window is not None, SINKS=sinks is not None,
        ALIBI=alibi_slopes is not None,
        ALIBI_DTYPE=types[traits.alibi_dtype or torch.float32],
        # the interpreter can't multiply bfloat16 matrices
        UPCAST=not query.is_cuda and query.dtype == torch.bfloat16,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: PagedBatch,
    traits: AttentionTraits,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """query `[T, heads, head_dim]`, kv_cache `[2, blocks, block_size, kv_heads, head_dim]` -> like query.

    sinks `[heads]` is one more logit per head, without a value; alibi_slopes float32 `[heads]`. `out`, on a GPU only:
    where to write; rows outside the batch are left alone.
    """
    if use_triton(query):
        return _launch(query, kv_cache, batch, traits, sinks, alibi_slopes, out)
    if query.device.type != "cpu":
        return paged_attention_reference(query, kv_cache, batch, traits, sinks, alibi_slopes)
    plain = sinks is None and alibi_slopes is None and traits.softcap is None
    if plain and can_decode(query, kv_cache, batch.max_seqlen_q):
        return decode_attention_cpu(
            query, kv_cache, batch.block_tables, batch.context_lens, traits.scaling, traits.sliding_window
        )
    plan = batch.cpu_plan(kv_cache.shape[2], traits.sliding_window)
    if plain:
        return cpu_attention(query, kv_cache, plan, traits.scaling)
    positions = plan.key_positions
    biases = None
    if alibi_slopes is not None:
        biases = [alibi_bias(alibi_slopes, p, traits.alibi_dtype).transpose(0, 1) for p in positions]
    return cpu_attention(query, kv_cache, plan, traits.scaling, traits.softcap, sinks, biases)
