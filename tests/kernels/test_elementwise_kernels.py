"""The small kernels: their CPU path and their Triton kernel against the reference, on every case."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from porter.kernels import act_and_mul as act_module
from porter.kernels import paged_attention as paged_module
from porter.kernels import rms_norm as norm_module
from porter.kernels import rotary_embedding as rotary_module
from porter.kernels import store_kv_cache as store_module
from porter.kernels.backend import HAS_TRITON
from porter.kernels.paged_attention import AttentionTraits, PagedBatch, paged_attention_reference

# the interpreter truncates where it should round to bfloat16
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
paths = pytest.mark.parametrize("path", ["cpu", pytest.param("kernel", marks=needs_triton)])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _on_the_gpu_where_there_is_one() -> Iterator[None]:
    """Kernels are compiled where a GPU is, and interpreted elsewhere."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", norm_module.CASES)
@dtypes
@paths
def test_rms_norm(case: dict[str, Any], dtype: torch.dtype, path: str) -> None:
    x = torch.randn(case["num_tokens"], case["hidden_size"]).to(dtype)
    weight = torch.randn(case["hidden_size"]).to(dtype)
    run = norm_module.rms_norm if path == "cpu" else norm_module._launch
    arguments = (x, weight, 1e-5, case["unit_offset"])
    assert_close(run(*arguments), norm_module.rms_norm_reference(*arguments))


@pytest.mark.parametrize("case", act_module.CASES)
@dtypes
@paths
def test_act_and_mul(case: dict[str, Any], dtype: torch.dtype, path: str) -> None:
    x = torch.randn(case["num_tokens"], 2 * case["size"]).to(dtype)
    run = act_module.act_and_mul if path == "cpu" else act_module._launch
    assert_close(run(x, case["hidden_act"]), act_module.act_and_mul_reference(x, case["hidden_act"]))


@pytest.mark.parametrize("case", rotary_module.CASES)
@pytest.mark.parametrize("packed", [True, False])
@dtypes
@paths
def test_rotary_embedding(case: dict[str, Any], packed: bool, dtype: torch.dtype, path: str) -> None:
    tokens, dim, interleaved = case["num_tokens"], case["head_dim"], case["interleaved"]
    num_heads, num_kv_heads = case["heads"]
    rows = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * dim).to(dtype)
    query, key, _ = rows.split_with_sizes([num_heads * dim, num_kv_heads * dim, num_kv_heads * dim], dim=-1)
    if not packed:
        query, key = query.clone(), key.clone()
    query, key = query.view(tokens, num_heads, dim), key.view(tokens, num_kv_heads, dim)
    angles = torch.randn(tokens, case["rotary_dim"] // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    tables = rotary_module.rotary_tables(cos, sin, interleaved)
    if path == "cpu":
        found = rotary_module.rotary_embedding(query, key, tables, interleaved)
    else:
        found = (rotary_module._launch(query, tables, interleaved), rotary_module._launch(key, tables, interleaved))
    for rotated, x in zip(found, (query, key), strict=True):
        assert_close(rotated, rotary_module.rotary_embedding_reference(x, cos, sin, interleaved))


@pytest.mark.parametrize("case", store_module.CASES)
@pytest.mark.parametrize("all_stored", [True, False])
@dtypes
@paths
def test_store_kv_cache(case: dict[str, Any], all_stored: bool, dtype: torch.dtype, path: str) -> None:
    tokens, heads, dim = case["num_tokens"], case["num_kv_heads"], case["head_dim"]
    rows = torch.randn(tokens, 3 * heads * dim).to(dtype)
    key, value = (x.view(tokens, heads, dim) for x in rows[:, : 2 * heads * dim].chunk(2, dim=-1))
    slots = torch.randperm(case["num_blocks"] * case["block_size"])[:tokens]
    if not all_stored:
        slots[tokens // 2] = -1
    shape = (2, case["num_blocks"], case["block_size"], heads, dim)
    found, expected = torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype)
    store_module.store_kv_cache_reference(key, value, expected, slots)
    if path == "cpu":
        store_module.store_kv_cache(key, value, found, slots, all_stored)
    else:
        store_module._launch(key, value, found, slots)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@needs_triton
def test_offsets_beyond_32_bits_are_reached() -> None:
    blocks, block_size, dim = 2**31 // 1024 + 2, 16, 64
    try:
        # reserved, but only the last block is ever touched
        cache = torch.empty(2, blocks, block_size, 1, dim, dtype=torch.float16, device=torch.get_default_device())
    except RuntimeError:
        pytest.skip("8 GiB of address space can't be reserved")
    key, value = torch.randn(2, 3, 1, dim).half()
    first = (blocks - 1) * block_size
    store_module._launch(key, value, cache, torch.arange(first, first + 3))
    torch.testing.assert_close(cache[:, -1, :3], torch.stack((key, value)), rtol=0, atol=0)

    batch = PagedBatch(torch.tensor([[blocks - 1]]).int(), torch.tensor([3]), torch.tensor([0, 3]), 3, 3)
    query, traits = torch.randn(3, 1, dim).half(), AttentionTraits(0.1)
    expected = paged_attention_reference(query, cache[:, -1:], replace(batch, block_tables=torch.zeros(1, 1)), traits)
    assert_close(paged_module._launch(query, cache, batch, traits, None, None), expected)


@needs_triton
def test_kernels_accept_no_tokens() -> None:
    nothing = torch.zeros(0, 2, 8)
    store_module._launch(nothing, nothing, torch.zeros(2, 1, 4, 2, 8), torch.zeros(0, dtype=torch.int64))
    tables = (torch.zeros(0, 1, 8), torch.zeros(0, 1, 8))
    assert rotary_module._launch(nothing, tables, False).shape == (0, 2, 8)
    assert norm_module._launch(nothing, torch.ones(8), 1e-5, False).shape == (0, 2, 8)
    assert act_module._launch(nothing, "silu").shape == (0, 2, 4)
