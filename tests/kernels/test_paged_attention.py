"""Paged attention: every path against the reference, and the reference against dense attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.kernels import paged_attention as module
from porter.kernels.backend import HAS_TRITON, INTERPRETED
from porter.kernels.paged_attention import (
    CASES,
    AttentionTraits,
    PagedBatch,
    paged_attention,
    paged_attention_reference,
)

BLOCK_SIZE = 8
UNWRITTEN = 2.0e4  # finite, but ruinous where a mask lets it through
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def name(case: dict[str, Any]) -> str:
    return f"{case['shape']}-{case['traits']}"


each_case = pytest.mark.parametrize("case", CASES, ids=name)


def make_batch(lens: list[tuple[int, int]], spare: int = 3) -> tuple[PagedBatch, int]:
    """A batch on shuffled blocks, and how many blocks the cache needs."""
    counts = [-(-context // BLOCK_SIZE) for _, context in lens]
    order = torch.randperm(sum(counts) + spare)[: sum(counts)].split_with_sizes(counts)
    tables = torch.full((len(lens), max(counts) + 1), 2**31 - 1, dtype=torch.int32)
    for row, blocks in zip(tables, order, strict=True):
        row[: len(blocks)] = blocks
    bounds = torch.tensor([0, *(query for query, _ in lens)]).cumsum(0).int()
    contexts = torch.tensor([context for _, context in lens], dtype=torch.int32)
    batch = PagedBatch(tables, contexts, bounds, max(q for q, _ in lens), int(contexts.max()))
    return batch, sum(counts) + spare


def make_inputs(case: dict[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
    heads, kv_heads, dim = case["heads"]
    options = dict(module._TRAITS[case["traits"]])
    sinks = torch.randn(heads).to(dtype) if options.pop("sinks", False) else None
    slopes = torch.rand(heads) if options.pop("alibi", False) else None
    batch, num_blocks = make_batch(case["lens"])
    kv_cache = torch.full((2, num_blocks, BLOCK_SIZE, kv_heads, dim), UNWRITTEN).to(dtype)
    for table, context in zip(batch.block_tables, batch.context_lens.tolist(), strict=True):
        for position in range(context):
            block = table[position // BLOCK_SIZE]
            kv_cache[:, block, position % BLOCK_SIZE] = torch.randn(2, kv_heads, dim).to(dtype)
    query = torch.randn(int(batch.cu_seqlens_q[-1]), heads, dim).to(dtype)
    return query, kv_cache, batch, AttentionTraits(dim**-0.5, **options), sinks, slopes


def compare(run: Callable[..., torch.Tensor], case: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(run(*inputs), paged_attention_reference(*inputs), rtol=tolerance, atol=tolerance)


@each_case
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_cpu_path_equals_the_reference(case: dict[str, Any], dtype: torch.dtype) -> None:
    compare(paged_attention, case, dtype)


# the interpreter truncates where it should round to bfloat16
@pytest.mark.parametrize("case", [c for c in CASES if c["traits"] != "alibi_bfloat16"], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="needs triton and its interpreter")
def test_the_kernel_equals_the_reference(case: dict[str, Any], dtype: torch.dtype) -> None:
    compare(module._launch, case, dtype)


@pytest.mark.gpu
@each_case
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_kernel_equals_the_reference_on_the_gpu(case: dict[str, Any], dtype: torch.dtype) -> None:
    query, kv_cache, batch, traits, sinks, slopes = make_inputs(case, dtype)
    expected = paged_attention_reference(query, kv_cache, batch, traits, sinks, slopes)
    on_gpu = PagedBatch(
        batch.block_tables.cuda(),
        batch.context_lens.cuda(),
        batch.cu_seqlens_q.cuda(),
        batch.max_seqlen_q,
        batch.max_context_len,
    )
    extras = [None if x is None else x.cuda() for x in (sinks, slopes)]
    found = paged_attention(query.cuda(), kv_cache.cuda(), on_gpu, traits, *extras)
    torch.testing.assert_close(found.cpu(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, traits: AttentionTraits) -> torch.Tensor:
    """Causal attention of whole sequences `[n, heads, dim]`, one query and head at a time."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for position in range(q.shape[0]):
        first = 0 if traits.sliding_window is None else max(0, position - traits.sliding_window + 1)
        for head in range(q.shape[1]):
            keys, values = k[first : position + 1, head // group], v[first : position + 1, head // group]
            scores = keys @ q[position, head] * traits.scaling
            if traits.softcap is not None:
                scores = traits.softcap * torch.tanh(scores / traits.softcap)
            out[position, head] = scores.softmax(0) @ values
    return out


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 21), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 5, 50]),
    softcap=st.sampled_from([None, 2.0]),
    data=st.data(),
)
def test_any_block_table_and_any_chunking_equal_dense_attention(
    lengths: list[int], heads: tuple[int, int], window: int | None, softcap: float | None, data: st.DataObject
) -> None:
    num_heads, kv_heads = heads
    traits = AttentionTraits(0.4, window, softcap)
    sequences = [[torch.randn(n, h, 4) for h in (num_heads, kv_heads, kv_heads)] for n in lengths]
    blocks = data.draw(st.permutations(range(sum(-(-n // BLOCK_SIZE) for n in lengths))))
    tables, taken = [], 0
    for n in lengths:
        tables.append(blocks[taken : taken + -(-n // BLOCK_SIZE)])
        taken += len(tables[-1])
    kv_cache = torch.full((2, len(blocks), BLOCK_SIZE, kv_heads, 4), UNWRITTEN)
    done = [0] * len(lengths)
    outputs: list[list[torch.Tensor]] = [[] for _ in lengths]
    while any(a < n for a, n in zip(done, lengths, strict=True)):
        active = [i for i, n in enumerate(lengths) if done[i] < n]
        chunks = [data.draw(st.integers(1, lengths[i] - done[i]), label="chunk") for i in active]
        for i, chunk in zip(active, chunks, strict=True):
            for position in range(done[i], done[i] + chunk):
                block = tables[i][position // BLOCK_SIZE]
                kv_cache[0, block, position % BLOCK_SIZE] = sequences[i][1][position]
                kv_cache[1, block, position % BLOCK_SIZE] = sequences[i][2][position]
        query = torch.cat([sequences[i][0][done[i] : done[i] + c] for i, c in zip(active, chunks, strict=True)])
        for i, chunk in zip(active, chunks, strict=True):
            done[i] += chunk
        width = max(len(tables[i]) for i in active)
        batch = PagedBatch(
            torch.tensor([[*tables[i], *[0] * (width - len(tables[i]))] for i in active], dtype=torch.int32),
            torch.tensor([done[i] for i in active], dtype=torch.int32),
            torch.tensor([0, *chunks]).cumsum(0).int(),
            max(chunks),
            max(done[i] for i in active),
        )
        reference = paged_attention_reference(query, kv_cache, batch, traits)
        torch.testing.assert_close(paged_attention(query, kv_cache, batch, traits), reference, rtol=1e-4, atol=1e-5)
        for i, part in zip(active, reference.split_with_sizes(chunks), strict=True):
            outputs[i].append(part)
    for parts, (q, k, v) in zip(outputs, sequences, strict=True):
        torch.testing.assert_close(torch.cat(parts), dense_attention(q, k, v, traits), rtol=1e-4, atol=1e-5)


def test_one_long_sequence_does_not_pad_the_short_ones() -> None:
    batch, _ = make_batch([(1, 100), (1, 4), (1, 3), (1, 5), (1, 90)])
    groups = batch.cpu_plan(BLOCK_SIZE, None).groups
    assert [(len(group.blocks), group.num_keys) for group in groups] == [(2, 100), (3, 5)]


def test_a_window_reads_only_its_keys() -> None:
    batch, _ = make_batch([(1, 100), (3, 50)])
    groups = batch.cpu_plan(BLOCK_SIZE, 10).groups
    assert [group.num_keys for group in groups] == [12, 10]
    assert [group.blocks.numel() for group in groups] == [3, 2]


def test_neighbouring_blocks_are_read_in_place() -> None:
    tables = torch.tensor([[2, 3, 4]], dtype=torch.int32)
    batch = PagedBatch(tables, torch.tensor([20]), torch.tensor([0, 1]), 1, 20)
    group = batch.cpu_plan(BLOCK_SIZE, None).groups[0]
    kv_cache = torch.randn(2, 6, BLOCK_SIZE, 1, 4)
    key, value = group.gather(kv_cache)
    assert key.data_ptr() == kv_cache[0, 2].data_ptr()
    torch.testing.assert_close(value[0, 0], kv_cache[1, 2:5].flatten(0, 1)[:20, 0])
