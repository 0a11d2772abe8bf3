"""Attention of one new token a sequence, with all that comes before it: normalise, rotate, store, attend.

The keys of a sequence are split over programs, so that a small batch fills the GPU; the last to finish joins the parts.
"""

from typing import Any

import torch

from porter.kernels.backend import dependent_launch, tl, triton
from porter.kernels.paged_attention import AttentionTraits, PagedBatch, paged_attention_reference
from porter.kernels.rotate import HeadNorm, Rotation, load_heads, norm_arguments, rotation_arguments
from porter.kernels.rotate_and_store import rotate_and_store_reference

# A program for each (sequence, KV head, split): so many fill a GPU
_PROGRAMS_PER_PROCESSOR = 4
_MAX_SPLITS = 64
_LEAST_SHARE = 2048  # keys of a program where there are programs enough
_MAX_COUNTERS = 65536
_counters: dict[torch.device, torch.Tensor] = {}

CASES: list[dict[str, Any]] = [
    {"contexts": [1, 8, 33], "heads": (4, 2, 16), "norm": True, "rotary_dim": 16, "splits": 1, "traits": {}},
    {"contexts": [300, 0, 7], "heads": (6, 2, 24), "norm": False, "rotary_dim": 8, "splits": 8, "traits": {}},
    {"contexts": [65, 200], "heads": (3, 1, 16), "norm": None, "rotary_dim": 16, "splits": 3,
     "traits": {"sliding_window": 70}},
    {"contexts": [130], "heads": (8, 8, 16), "norm": None, "rotary_dim": 0, "splits": 2,
     "traits": {"softcap": 3.0, "sinks": True}},
    {"contexts": [129, 40], "heads": (5, 5, 20), "norm": None, "rotary_dim": 0, "splits": 4, "traits": {"alibi": True}},
]  # fmt: skip


# What a step's batch decides is not specialised on, or kernels would be compiled while serving
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["stride_table", "splits", "least_share"],
    do_not_specialize_on_alignment=["block_tables_ptr", "context_lens_ptr", "positions_ptr", "slot_mapping_ptr"],
)
def _decode_attention_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, out_ptr,
    sinks_ptr, slopes_ptr, query_norm_ptr, key_norm_ptr, cos_ptr, sin_ptr, positions_ptr, slot_mapping_ptr,
    block_tables_ptr, context_lens_ptr, acc_ptr, total_ptr, counters_ptr,
    stride_query, stride_query_head, stride_key, stride_key_head, stride_value, stride_value_head,
    stride_block, stride_slot, stride_kv_head, stride_table,
    scaling, softcap, window, group, head_dim, rotary_dim, block_size, query_eps, key_eps, splits, least_share,
    QUERY_NORM: tl.constexpr, QUERY_OFFSET: tl.constexpr, KEY_NORM: tl.constexpr, KEY_OFFSET: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, STORE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr,
    ALIBI_DTYPE: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    # One program: the query heads that share a KV head of one sequence, over one share of its keys.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # neighbouring programs read neighbouring heads: their pieces of a block lie in one page of the memory
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    context_len = tl.load(context_lens_ptr + sequence)
    begin = 0
    if WINDOW:
        begin = tl.maximum(context_len - window, 0)
    share = tl.maximum(tl.cdiv(tl.cdiv(context_len - begin, splits), BLOCK_N) * BLOCK_N, least_share)
    active = tl.cdiv(context_len - begin, tl.maximum(share, 1))
    if split < active:
        low = begin + split * share
        high = tl.minimum(low + share, context_len)
        dims = tl.arange(0, BLOCK_D)
        in_head = dims < head_dim
        rows = tl.arange(0, BLOCK_G)
        live = rows < group
        heads = kv_head * group + rows
        position = tl.load(positions_ptr + sequence)
        query = load_heads(
            query_ptr + sequence * stride_query, query_norm_ptr, cos_ptr, sin_ptr, heads, live, position,
            stride_query_head, head_dim, rotary_dim, query_eps, QUERY_NORM, QUERY_OFFSET, ROTATE, INTERLEAVED, BLOCK_D,
        )  # fmt: skip
        if STORE:
            slot = tl.load(slot_mapping_ptr + sequence)
            if (high == context_len) & (slot >= 0):
                one = tl.zeros([1], tl.int32)
                fresh = load_heads(
                    key_ptr + sequence * stride_key, key_norm_ptr, cos_ptr, sin_ptr, one + kv_head, one == 0, position,
                    stride_key_head, head_dim, rotary_dim, key_eps, KEY_NORM, KEY_OFFSET, ROTATE, INTERLEAVED, BLOCK_D,
                )  # fmt: skip
                place = (slot // block_size) * stride_block + (slot % block_size) * stride_slot
                place += kv_head * stride_kv_head + dims
                element = key_cache_ptr.dtype.element_ty
                tl.store(key_cache_ptr + place[None, :] + one[:, None], fresh.to(element), mask=in_head[None, :])
                source = value_ptr + sequence * stride_value + kv_head * stride_value_head + dims
                new_value = tl.load(source, mask=in_head, other=0.0)
                tl.store(value_cache_ptr + place, new_value.to(element), mask=in_head)
            # what this program stored it also reads
            tl.debug_barrier()
        if UPCAST:
            query = query.to(tl.float32)
        highest = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        if SINKS and split == 0:
            highest = tl.load(sinks_ptr + heads, mask=live, other=0.0).to(tl.float32)
            total += 1.0
        if ALIBI:
            slope = tl.load(slopes_ptr + heads, mask=live, other=0.0).to(ALIBI_DTYPE).to(tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for start in range(low, high, BLOCK_N):
            key_pos = start + tl.arange(0, BLOCK_N)
            seen = key_pos < high
            # lanes past the end point at block 0 and are masked out of every load
            block = tl.load(block_tables_ptr + sequence * stride_table + key_pos // block_size, mask=seen, other=0)
            offset = block.to(tl.int64) * stride_block + (key_pos % block_size) * stride_slot + kv_head * stride_kv_head
            readable = seen[:, None] & in_head[None, :]
            key = tl.load(key_cache_ptr + offset[:, None] + dims[None, :], mask=readable, other=0.0)
            value = tl.load(value_cache_ptr + offset[:, None] + dims[None, :], mask=readable, other=0.0)
            if UPCAST:
                key = key.to(tl.float32)
                value = value.to(tl.float32)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
            if ALIBI:
                # a float32 product of two rounded numbers is exact: rounding it is multiplying in ALIBI_DTYPE
                bias = slope[:, None] * key_pos[None, :].to(tl.float32).to(ALIBI_DTYPE).to(tl.float32)
                scores += bias.to(ALIBI_DTYPE).to(tl.float32)
            if SOFTCAP:
                # tanh(x) = 1 - 2 / (exp(2x) + 1), which saturates without overflowing to NaN
                scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
            scores = tl.where(seen[None, :], scores, float("-inf"))
            # every block has a visible key, so the new maximum is finite
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp(scores - new_highest[:, None])
            shrink = tl.exp(highest - new_highest)
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            highest = new_highest
        target = (sequence * tl.num_programs(0) * group + heads)[:, None] * head_dim + dims[None, :]
        inside = live[:, None] & in_head[None, :]
        last = active <= 1
        if active > 1:
            pair = sequence * tl.num_programs(0) + kv_head
            part = (pair * splits + split) * BLOCK_G + rows
            tl.store(acc_ptr + part[:, None] * BLOCK_D + dims[None, :], acc, mask=live[:, None])
            tl.store(total_ptr + part * 2, highest)
            tl.store(total_ptr + part * 2 + 1, total)
            tl.debug_barrier()
            last = tl.atomic_add(counters_ptr + pair, 1, sem="acq_rel") == active - 1
            if last:
                tl.debug_barrier()
                tl.store(counters_ptr + pair, 0)
                all_splits = tl.arange(0, MAX_SPLITS)
                parts = (pair * splits + all_splits)[:, None] * BLOCK_G + rows[None, :]
                maxima = tl.load(
                    total_ptr + parts * 2,
                    mask=(all_splits < active)[:, None],
                    other=float("-inf"),
                    cache_modifier=".cg",
                )
                highest = tl.max(maxima, 0)
                total = tl.zeros([BLOCK_G], tl.float32)
                acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
                # the loads of an iteration do not wait for each other
                for first in range(0, active, 4):
                    for i in tl.static_range(4):
                        present = live & (rows * 0 + (first + i) < active)
                        part = (pair * splits + first + i) * BLOCK_G + rows
                        part_highest = tl.load(
                            total_ptr + part * 2, mask=present, other=float("-inf"), cache_modifier=".cg"
                        )
                        factor = tl.exp(part_highest - highest)
                        total += factor * tl.load(
                            total_ptr + part * 2 + 1, mask=present, other=0.0, cache_modifier=".cg"
                        )
                        piece = tl.load(
                            acc_ptr + part[:, None] * BLOCK_D + dims[None, :],
                            mask=present[:, None], other=0.0, cache_modifier=".cg",
                        )  # fmt: skip
                        acc += piece * factor[:, None]
        if last:
            total = tl.where(total > 0, total, 1.0)  # lanes beyond the group have seen nothing
            tl.store(out_ptr + target, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    elif split == 0:
        # a row without a sequence: its output is read by what follows, so it must be a number
        dims = tl.arange(0, BLOCK_D)
        rows = tl.arange(0, BLOCK_G)
        target = (sequence * tl.num_programs(0) * group + kv_head * group + rows)[:, None] * head_dim + dims[None, :]
        zeros = tl.zeros([BLOCK_G, BLOCK_D], tl.float32).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + target, zeros, mask=(rows < group)[:, None] & (dims < head_dim)[None, :])


def choose_splits(num_seqs: int, num_kv_heads: int, device: torch.device) -> tuple[int, int]:
    """(how many programs share a sequence's keys at most, how many keys one has at least)."""
    if device.type != "cuda" or num_seqs * num_kv_heads > _MAX_COUNTERS:
        return 1, 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = -(-processors * _PROGRAMS_PER_PROCESSOR // (num_seqs * num_kv_heads))
    # with programs enough, only a very long sequence is shared out: the GPU would wait for it
    return (min(wanted, _MAX_SPLITS), 1) if wanted > 8 else (8, _LEAST_SHARE)


def _tile(splits: int, row_bytes: int) -> tuple[int, int]:
    """(BLOCK_N, warps), measured on an H100: small batches wait for latency, large ones for bandwidth."""
    if row_bytes > 256:
        return 32, 4
    return (64, 8) if splits > 8 else (128, 4)


def _zeroed_counters(device: torch.device) -> torch.Tensor:
    """Zero before and after every launch. Made once, so that no CUDA graph owns it."""
    if device not in _counters:
        _counters[device] = torch.zeros(_MAX_COUNTERS, dtype=torch.int32, device=device)
    return _counters[device]


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    batch: PagedBatch,
    traits: AttentionTraits,
    norms: tuple[HeadNorm | None, HeadNorm | None] = (None, None),
    rotation: Rotation | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[3]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    store = out is None
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    if not num_seqs:
        return out
    splits, least_share = (splits, 1) if splits else choose_splits(num_seqs, num_kv_heads, query.device)
    group = num_heads // num_kv_heads
    block_g, block_d = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(head_dim))
    block_n, warps = _tile(splits, block_d * kv_cache.element_size())
    parts = num_seqs * num_kv_heads * splits * block_g if splits > 1 else 0
    acc = torch.empty(parts, block_d, dtype=torch.float32, device=query.device)
    total = torch.empty(parts, 2, dtype=torch.float32, device=query.device)
    query_norm, query_eps = norm_arguments(norms[0])
    key_norm, key_eps = norm_arguments(norms[1])
    cos, sin, rotary_dim = rotation_arguments(rotation)
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    _decode_attention_kernel[(num_kv_heads, num_seqs, splits)](
        query, key, value, kv_cache[0], kv_cache[1], out,
        sinks, alibi_slopes, query_norm, key_norm, cos, sin, positions, slot_mapping,
        batch.block_tables, batch.context_lens, acc, total, _zeroed_counters(query.device),
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        kv_cache.stride(1), kv_cache.stride(2), kv_cache.stride(3), batch.block_tables.stride(0),
        traits.scaling, traits.softcap or 1.0, traits.sliding_window or 0, group, head_dim, rotary_dim,
        kv_cache.shape[2], query_eps, key_eps, splits, least_share,
        QUERY_NORM=norms[0] is not None, QUERY_OFFSET=norms[0] is not None and norms[0].unit_offset,
        KEY_NORM=norms[1] is not None, KEY_OFFSET=norms[1] is not None and norms[1].unit_offset,
        ROTATE=rotation is not None, INTERLEAVED=rotation is not None and rotation.interleaved, STORE=store,
        SOFTCAP=traits.softcap is not None, WINDOW=traits.sliding_window is not None, SINKS=sinks is not None,
        ALIBI=alibi_slopes is not None, ALIBI_DTYPE=types[traits.alibi_dtype or torch.float32],
        # the interpreter can't multiply bfloat16 matrices
        UPCAST=not query.is_cuda and query.dtype == torch.bfloat16,
        BLOCK_G=block_g, BLOCK_N=block_n, BLOCK_D=block_d, MAX_SPLITS=_MAX_SPLITS,
        num_warps=warps, num_stages=2, **dependent_launch(query),
    )  # fmt: skip
    return out


def decode_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    batch: PagedBatch,
    traits: AttentionTraits,
    norms: tuple[HeadNorm | None, HeadNorm | None] = (None, None),
    rotation: Rotation | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """As decode_attention, in plain torch."""
    query = rotate_and_store_reference(query, key, value, kv_cache, slot_mapping, positions, norms, rotation)
    out = torch.zeros_like(query)
    full = batch.context_lens > 0
    each = PagedBatch(
        batch.block_tables[full],
        batch.context_lens[full],
        torch.arange(int(full.sum()) + 1, dtype=torch.int32, device=query.device),
        1,
        batch.max_context_len,
    )
    out[full] = paged_attention_reference(query[full], kv_cache, each, traits, sinks, alibi_slopes)
    return out


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    batch: PagedBatch,
    traits: AttentionTraits,
    norms: tuple[HeadNorm | None, HeadNorm | None] = (None, None),
    rotation: Rotation | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token a sequence, on a GPU: query `[num_seqs, heads, head_dim]`, key and value `[num_seqs, kv_heads,
    head_dim]` -> like query.

    First what rotate_and_store does, unless `out` (contiguous) is given: then that was done, and `out` is filled. A
    context length of 0 marks a row without a sequence: its output is 0. All sizes of the launch depend on
    shapes alone, so it can be recorded in a CUDA graph.
    """
    return _launch(
        query,
        key,
        value,
        kv_cache,
        slot_mapping,
        positions,
        batch,
        traits,
        norms,
        rotation,
        sinks,
        alibi_slopes,
        out,
    )
