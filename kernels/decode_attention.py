"""Attention of one new token a sequence, with all that comes before it: normalise, rotate, store, attend.

The keys of all sequences, laid end to end, are cut into ranges of equal length, as many as fill the GPU at once: all
programs end together however long each sequence is. A sequence that lies in several ranges is joined by the last of
their programs to finish.
"""

from typing import Any

import torch

from porter.kernels.backend import dependent_launch, tl, triton
from porter.kernels.paged_attention import AttentionTraits, PagedBatch, paged_attention_reference
from porter.kernels.rotate import HeadNorm, Rotation, load_heads, norm_arguments, rotation_arguments
from porter.kernels.rotate_and_store import rotate_and_store_reference

_MAX_PARTS = 64  # of a sequence that is alone
_GRAINS = 4  # a range ends at a multiple of BLOCK_N / _GRAINS keys of a sequence, and has _GRAINS of them at least
_MAX_PROGRAMS = 65536
_NOTHING = tl.constexpr(-1e30)  # a maximum over no score; finite, so that differences are
_counters: dict[torch.device, torch.Tensor] = {}

CASES: list[dict[str, Any]] = [
    {"contexts": [1, 8, 33], "heads": (4, 2, 16), "norm": True, "rotary_dim": 16, "ranges": 1, "traits": {}},
    {"contexts": [300, 0, 7], "heads": (6, 2, 24), "norm": False, "rotary_dim": 8, "ranges": 8, "traits": {}},
    {"contexts": [65, 200], "heads": (3, 1, 16), "norm": None, "rotary_dim": 16, "ranges": 3,
     "traits": {"sliding_window": 70}},
    {"contexts": [130], "heads": (8, 8, 16), "norm": None, "rotary_dim": 0, "ranges": 2,
     "traits": {"softcap": 3.0, "sinks": True}},
    {"contexts": [129, 40], "heads": (5, 5, 20), "norm": None, "rotary_dim": 0, "ranges": 4, "traits": {"alibi": True}},
]  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _num_grains(context_len, window, WINDOW: tl.constexpr, GRAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """(first key that is seen, how many grains from there on)."""
    begin = context_len * 0
    if WINDOW:
        begin = tl.maximum(context_len - window, 0)
    return begin, (context_len - begin + GRAIN - 1) // GRAIN


@triton.jit  # type: ignore[untyped-decorator]
def _biased(  # type: ignore[no-untyped-def]
    scores, slope, key_pos, softcap, ALIBI: tl.constexpr, ALIBI_DTYPE: tl.constexpr, SOFTCAP: tl.constexpr
):
    if ALIBI:
        # a float32 product of two rounded numbers is exact: rounding it is multiplying in ALIBI_DTYPE
        bias = slope * key_pos.to(tl.float32).to(ALIBI_DTYPE).to(tl.float32)
        scores += bias.to(ALIBI_DTYPE).to(tl.float32)
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which saturates without overflowing to NaN
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
    return scores


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    out_ptr, acc_ptr, total_ptr, counters_ptr, first_part, last_part, kv_head, num_kv_heads, group, head_dim,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The last of a sequence's programs to come here joins what they have left."""
    counter = counters_ptr + first_part * num_kv_heads + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") == last_part - first_part:
        tl.debug_barrier()
        tl.store(counter, 0)
        dims = tl.arange(0, BLOCK_D)
        rows = tl.arange(0, BLOCK_G)
        live = rows < group
        highest = tl.full([BLOCK_G], _NOTHING, tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        # the loads of an iteration do not wait for each other
        for some in range(first_part, last_part + 1, 2):
            for i in tl.static_range(2):
                present = live & (rows * 0 + (some + i) <= last_part)
                # the first part is the end of its program's range, the others are the beginnings of theirs
                at_end = tl.where(rows * 0 + (some + i) == first_part, 1, 0)
                place = (((some + i) * num_kv_heads + kv_head) * 2 + at_end) * BLOCK_G + rows
                peak = tl.load(total_ptr + place * 2, mask=present, other=_NOTHING, cache_modifier=".cg")
                part_total = tl.load(total_ptr + place * 2 + 1, mask=present, other=0.0, cache_modifier=".cg")
                piece = tl.load(
                    acc_ptr + place[:, None] * BLOCK_D + dims[None, :],
                    mask=present[:, None], other=0.0, cache_modifier=".cg",
                )  # fmt: skip
                new_highest = tl.maximum(highest, peak)
                factor, shrink = tl.exp(peak - new_highest), tl.exp(highest - new_highest)
                total = total * shrink + part_total * factor
                acc = acc * shrink[:, None] + piece * factor[:, None]
                highest = new_highest
        total = tl.where(total > 0, total, 1.0)  # lanes beyond the group have seen nothing
        place = out_ptr + ((kv_head * group + rows) * head_dim)[:, None] + dims[None, :]
        inside = live[:, None] & (dims < head_dim)[None, :]
        tl.store(place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


# What a step's batch decides is not specialised on, or kernels would be compiled while serving
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["stride_table", "num_seqs"],
    do_not_specialize_on_alignment=["block_tables_ptr", "context_lens_ptr", "positions_ptr", "slot_mapping_ptr"],
)
def _decode_attention_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, out_ptr,
    sinks_ptr, slopes_ptr, query_norm_ptr, key_norm_ptr, cos_ptr, sin_ptr, positions_ptr, slot_mapping_ptr,
    block_tables_ptr, context_lens_ptr, acc_ptr, total_ptr, counters_ptr,
    stride_query, stride_query_head, stride_key, stride_key_head, stride_value, stride_value_head,
    stride_block, stride_slot, stride_kv_head, stride_table,
    scaling, softcap, window, group, head_dim, rotary_dim, query_eps, key_eps, num_seqs,
    QUERY_NORM: tl.constexpr, QUERY_OFFSET: tl.constexpr, KEY_NORM: tl.constexpr, KEY_OFFSET: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, STORE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr,
    ALIBI_DTYPE: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, GRAINS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    # One program: the query heads that share a KV head, over one range of the keys of all sequences.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    GRAIN: tl.constexpr = BLOCK_N // GRAINS
    # neighbouring programs read neighbouring heads: their pieces of a block lie in one page of the memory
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    part = tl.program_id(1)
    wide = part.to(tl.int64) * 0
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < head_dim
    rows = tl.arange(0, BLOCK_G)
    live = rows < group
    heads = kv_head * group + rows
    inside = live[:, None] & in_head[None, :]
    lanes = tl.arange(0, BLOCK_S)
    num_grains = 0
    for some in range(0, num_seqs, BLOCK_S):
        lens = tl.load(context_lens_ptr + some + lanes, mask=some + lanes < num_seqs, other=0)
        num_grains += tl.sum(_num_grains(lens, window, WINDOW, GRAIN)[1], 0)
    share = tl.maximum(tl.cdiv(num_grains, tl.num_programs(1)), GRAINS)
    first = part * share
    stop = tl.minimum(first + share, num_grains)
    # the sequences in which the range begins and ends, and the grains before each of them
    sequence, last_sequence, seq_first, last_first, passed = 0, 0, 0, 0, 0
    for some in range(0, num_seqs, BLOCK_S):
        lens = tl.load(context_lens_ptr + some + lanes, mask=some + lanes < num_seqs, other=0)
        grains = _num_grains(lens, window, WINDOW, GRAIN)[1]
        ends = passed + tl.cumsum(grains, 0)
        sequence += tl.sum((ends <= first).to(tl.int32), 0)
        seq_first = tl.maximum(seq_first, tl.max(tl.where(ends <= first, ends, 0), 0))
        last_sequence += tl.sum((ends < stop).to(tl.int32), 0)
        last_first = tl.maximum(last_first, tl.max(tl.where(ends < stop, ends, 0), 0))
        passed += tl.sum(grains, 0)
    # until here only what the host sent with the step was read
    if PDL:
        tl.extra.cuda.gdc_wait()
    for spare in range(part, num_seqs, tl.num_programs(1)):
        if tl.load(context_lens_ptr + spare) == 0:
            # a row without a sequence: its output is read by what follows, so it must be a number
            target = out_ptr + (((wide + spare) * num_kv_heads * group + heads) * head_dim)[:, None] + dims[None, :]
            tl.store(target, tl.zeros([BLOCK_G, BLOCK_D], tl.float32).to(out_ptr.dtype.element_ty), mask=inside)
    if first < stop:
        slope = tl.zeros([BLOCK_G], tl.float32)
        if ALIBI:
            slope = tl.load(slopes_ptr + heads, mask=live, other=0.0).to(ALIBI_DTYPE).to(tl.float32)
        before = seq_first
        for index in range(sequence, last_sequence + 1):
            context_len = tl.load(context_lens_ptr + index)
            begin, grains = _num_grains(context_len, window, WINDOW, GRAIN)
            from_grain = tl.maximum(first - before, 0)
            to_grain = tl.minimum(stop - before, grains)
            if from_grain < to_grain:
                row = wide + index
                high = tl.minimum(begin + to_grain * GRAIN, context_len)
                position = tl.load(positions_ptr + row)
                query = load_heads(
                    query_ptr + row * stride_query, query_norm_ptr, cos_ptr, sin_ptr, heads, live, position,
                    stride_query_head, head_dim, rotary_dim, query_eps, QUERY_NORM, QUERY_OFFSET, ROTATE, INTERLEAVED,
                    BLOCK_D,
                )  # fmt: skip
                highest = tl.full([BLOCK_G], _NOTHING, tl.float32)
                total = tl.zeros([BLOCK_G], tl.float32)
                acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
                if SINKS and from_grain == 0:
                    highest = tl.load(sinks_ptr + heads, mask=live, other=0.0).to(tl.float32)
                    total += 1.0
                if STORE and to_grain == grains:
                    one = tl.zeros([1], tl.int32)
                    fresh = load_heads(
                        key_ptr + row * stride_key, key_norm_ptr, cos_ptr, sin_ptr, one + kv_head, one == 0,
                        position, stride_key_head, head_dim, rotary_dim, key_eps, KEY_NORM, KEY_OFFSET, ROTATE,
                        INTERLEAVED, BLOCK_D,
                    ).to(key_cache_ptr.dtype.element_ty)  # fmt: skip
                    source = value_ptr + row * stride_value + kv_head * stride_value_head + dims
                    newest = tl.load(source, mask=in_head, other=0.0).to(key_cache_ptr.dtype.element_ty)
                    slot = tl.load(slot_mapping_ptr + row)
                    if slot >= 0:
                        home = (slot // BLOCK_SIZE) * stride_block + (slot % BLOCK_SIZE) * stride_slot
                        home += kv_head * stride_kv_head + dims
                        tl.store(key_cache_ptr + home[None, :] + one[:, None], fresh, mask=in_head[None, :])
                        tl.store(value_cache_ptr + home, newest, mask=in_head)
                    score = tl.sum(query.to(tl.float32) * fresh.to(tl.float32), 1) * scaling
                    score = _biased(score, slope, position, softcap, ALIBI, ALIBI_DTYPE, SOFTCAP)
                    peak = tl.maximum(highest, score)
                    weight = tl.exp(score - peak)
                    total = total * tl.exp(highest - peak) + weight
                    acc += weight[:, None] * newest.to(tl.float32)[None, :]
                    highest = peak
                    # it is not read from where it is being stored
                    high = tl.minimum(high, context_len - 1)
                if UPCAST:
                    query = query.to(tl.float32)
                for start in range(begin + from_grain * GRAIN, high, BLOCK_N):
                    key_pos = start + tl.arange(0, BLOCK_N)
                    seen = key_pos < high
                    # lanes past the end point at block 0 and are masked out of every load
                    block = tl.load(block_tables_ptr + row * stride_table + key_pos // BLOCK_SIZE, mask=seen, other=0)
                    offset = block.to(tl.int64) * stride_block + (key_pos % BLOCK_SIZE) * stride_slot
                    offset += kv_head * stride_kv_head
                    readable = seen[:, None] & in_head[None, :]
                    key = tl.load(key_cache_ptr + offset[:, None] + dims[None, :], mask=readable, other=0.0)
                    value = tl.load(value_cache_ptr + offset[:, None] + dims[None, :], mask=readable, other=0.0)
                    if UPCAST:
                        key = key.to(tl.float32)
                        value = value.to(tl.float32)
                    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
                    scores = _biased(scores, slope[:, None], key_pos[None, :], softcap, ALIBI, ALIBI_DTYPE, SOFTCAP)
                    scores = tl.where(seen[None, :], scores, float("-inf"))
                    peak = tl.maximum(highest, tl.max(scores, 1))
                    weights = tl.exp(scores - peak[:, None])
                    shrink = tl.exp(highest - peak)
                    total = total * shrink + tl.sum(weights, 1)
                    acc = acc * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
                    highest = peak
                if (from_grain == 0) & (to_grain == grains):
                    target = out_ptr + ((row * num_kv_heads * group + heads) * head_dim)[:, None] + dims[None, :]
                    shown = acc / tl.where(total > 0, total, 1.0)[:, None]  # lanes beyond the group have seen nothing
                    tl.store(target, shown.to(out_ptr.dtype.element_ty), mask=inside)
                else:
                    # of the sequences in a range, the first may have begun before it and the last may go on after it
                    place = ((part * num_kv_heads + kv_head) * 2 + (from_grain == 0).to(tl.int32)) * BLOCK_G + rows
                    tl.store(acc_ptr + place[:, None] * BLOCK_D + dims[None, :], acc, mask=live[:, None])
                    tl.store(total_ptr + place * 2, highest)
                    tl.store(total_ptr + place * 2 + 1, total)
            before += grains
        tl.debug_barrier()
        for side in range(2):
            index = tl.where(side == 0, sequence, last_sequence)
            before = tl.where(side == 0, seq_first, last_first)
            grains = _num_grains(tl.load(context_lens_ptr + index), window, WINDOW, GRAIN)[1]
            begun = first > before
            if (begun == (side == 0)) & (begun | (before + grains > stop)):
                _join(
                    out_ptr + (wide + index) * num_kv_heads * group * head_dim, acc_ptr, total_ptr, counters_ptr,
                    before // share, (before + grains - 1) // share, kv_head, num_kv_heads, group, head_dim,
                    BLOCK_G, BLOCK_D,
                )  # fmt: skip


def choose_ranges(num_seqs: int, num_kv_heads: int, per_processor: int, device: torch.device) -> int:
    """How many ranges the keys of a batch are cut into: with each KV head's programs, what the GPU runs at once."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(processors * per_processor // num_kv_heads, _MAX_PARTS * num_seqs))


def _tile(num_units: int, row_bytes: int) -> tuple[int, int, int, int | None]:
    """(BLOCK_N, warps, programs that a processor runs at once, registers of a thread), measured on an H100: small
    batches wait for latency, large ones for bandwidth. The registers decide how many programs fit."""
    if row_bytes > 256:
        return 32, 4, 2, None
    if num_units <= 64:
        return 128, 8, 1, None
    return (64, 4, 5, 96) if row_bytes <= 128 else (64, 4, 3, 168)


def _zeroed_counters(device: torch.device) -> torch.Tensor:
    """Zero before and after every launch. Made once, so that no CUDA graph owns it."""
    if device not in _counters:
        _counters[device] = torch.zeros(_MAX_PROGRAMS, dtype=torch.int32, device=device)
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
    ranges: int | None = None,
) -> torch.Tensor:
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[3]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    store = out is None
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    if not num_seqs:
        return out
    group = num_heads // num_kv_heads
    block_g, block_d = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(head_dim))
    block_n, warps, per_processor, registers = _tile(num_seqs * num_kv_heads, block_d * kv_cache.element_size())
    ranges = ranges or choose_ranges(num_seqs, num_kv_heads, per_processor, query.device)
    parts = ranges * num_kv_heads * 2 * block_g if ranges > 1 else 0
    acc = torch.empty(parts, block_d, dtype=torch.float32, device=query.device)
    total = torch.empty(parts, 2, dtype=torch.float32, device=query.device)
    query_norm, query_eps = norm_arguments(norms[0])
    key_norm, key_eps = norm_arguments(norms[1])
    cos, sin, rotary_dim = rotation_arguments(rotation)
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    _decode_attention_kernel[(num_kv_heads, ranges)](
        query, key, value, kv_cache[0], kv_cache[1], out,
        sinks, alibi_slopes, query_norm, key_norm, cos, sin, positions, slot_mapping,
        batch.block_tables, batch.context_lens, acc, total, _zeroed_counters(query.device),
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        kv_cache.stride(1), kv_cache.stride(2), kv_cache.stride(3), batch.block_tables.stride(0),
        traits.scaling, traits.softcap or 1.0, traits.sliding_window or 0, group, head_dim, rotary_dim,
        query_eps, key_eps, num_seqs,
        QUERY_NORM=norms[0] is not None, QUERY_OFFSET=norms[0] is not None and norms[0].unit_offset,
        KEY_NORM=norms[1] is not None, KEY_OFFSET=norms[1] is not None and norms[1].unit_offset,
        ROTATE=rotation is not None, INTERLEAVED=rotation is not None and rotation.interleaved, STORE=store,
        SOFTCAP=traits.softcap is not None, WINDOW=traits.sliding_window is not None, SINKS=sinks is not None,
        ALIBI=alibi_slopes is not None, ALIBI_DTYPE=types[traits.alibi_dtype or torch.float32],
        # the interpreter can't multiply bfloat16 matrices
        UPCAST=not query.is_cuda and query.dtype == torch.bfloat16,
        BLOCK_G=block_g, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_S=128, GRAINS=_GRAINS, BLOCK_SIZE=kv_cache.shape[2],
        num_warps=warps, num_stages=2, maxnreg=registers, **dependent_launch(query),
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
