"""The C++ kernels for the CPU: how they are compiled, and what happens where they can't be."""

import ctypes
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from porter.kernels import cpu_library
from porter.kernels.act_and_mul import act_and_mul, act_and_mul_reference
from porter.kernels.argmax import argmax
from porter.kernels.cpu_library import cpu_function
from porter.kernels.decode_attention_cpu import can_decode, decode_attention_cpu
from porter.kernels.draw_tokens import draw_tokens, draw_tokens_reference
from porter.kernels.int8_linear import quantize_int8
from porter.kernels.paged_attention import AttentionTraits, PagedBatch, paged_attention_reference
from porter.kernels.panel_linear import CASES, can_pack_panels, pack_panels, panel_linear, panel_linear_reference
from porter.kernels.rms_norm import rms_norm, rms_norm_reference
from porter.kernels.rotary_embedding import rotary_embedding_reference, rotary_tables
from porter.kernels.rotate_and_store_cpu import can_rotate_and_store, rotate_and_store_cpu
from porter.kernels.scaled_linear import dequantize
from porter.kernels.store_kv_cache import store_kv_cache_reference

can_compile = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and a C++ compiler"
)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_library(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has not looked for its library yet."""
    for function in (cpu_library._library, cpu_function):
        monkeypatch.setattr(cpu_library, function.__name__, function.__wrapped__)
    return empty_cache


@can_compile
def test_the_library_is_compiled_once_and_leaves_nothing_else(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = cpu_library._compiled()
    assert list((empty_cache / "porter").iterdir()) == [built]
    monkeypatch.setattr(cpu_library, "_build", lambda *_: pytest.fail("compiled again"))
    assert cpu_library._compiled() == built
    assert hasattr(ctypes.CDLL(str(built)), "linear_float32")


@can_compile
def test_one_openmp_serves_torch_and_the_library() -> None:
    assert cpu_function("linear", torch.float32, "pipppiii") is not None
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) == 1


def test_without_a_compiler_one_line_says_so(no_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match=r"slower ones of torch are used \(they need Linux and g\+\+\)"):
        assert cpu_library.cpu_function("linear", torch.float32, "pipppiii") is None
    assert not list(no_library.rglob("*.so"))


@can_compile
def test_a_failed_compilation_leaves_nothing(no_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "_FLAGS", ("-fno-such-flag",))
    with pytest.warns(UserWarning, match="no-such-flag"):
        assert cpu_library._library() is None
    assert not os.listdir(no_library / "porter")


@can_compile
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_panel_linear(case: dict[str, Any], dtype: torch.dtype) -> None:
    weight = torch.randn(case["out_features"], case["in_features"]).to(dtype)
    bias = torch.randn(case["out_features"]).to(dtype) if case["bias"] else None
    wide = torch.randn(case["num_tokens"], case["in_features"] + 5).to(dtype)
    x = wide[:, : case["in_features"]]
    assert can_pack_panels(weight, dtype)
    found = panel_linear(x, pack_panels(weight, dtype), case["out_features"], bias)
    expected = panel_linear_reference(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    scale = case["in_features"] ** 0.5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * scale)


@can_compile
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_panel_linear_of_int8(case: dict[str, Any], dtype: torch.dtype) -> None:
    weight, scale = quantize_int8(torch.randn(case["out_features"], case["in_features"]))
    bias = torch.randn(case["out_features"]).to(dtype) if case["bias"] else None
    x = torch.randn(case["num_tokens"], case["in_features"]).to(dtype)
    found = panel_linear(x, pack_panels(weight, dtype), case["out_features"], bias, scale)
    wide = None if bias is None else bias.double()
    expected = F.linear(x.double(), dequantize(weight, scale.double(), torch.float64), wide)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * case["in_features"] ** 0.5)


@can_compile
def test_panel_linear_takes_any_leading_dimensions_and_one_dtype() -> None:
    weight = torch.randn(10, 6)
    panels, x = pack_panels(weight, torch.float32), torch.randn(2, 6, 3).transpose(1, 2)
    torch.testing.assert_close(panel_linear(x, panels, 10), x @ weight.T)
    with pytest.raises(TypeError, match="bfloat16"):
        panel_linear(x.bfloat16(), panels, 10)


def test_float16_is_left_to_torch() -> None:
    assert not can_pack_panels(torch.zeros(4, 4, dtype=torch.float16), torch.float16)
    assert not can_pack_panels(torch.zeros(4, 4, dtype=torch.int8), torch.float16)


compiled = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-5 if found.dtype == torch.float32 else 1.6e-2
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@can_compile
@compiled
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("size", [(1, 64), (3, 129), (700, 80)])
def test_rms_norm(dtype: torch.dtype, unit_offset: bool, size: tuple[int, int]) -> None:
    x, weight = torch.randn(size[0], size[1] + 3).to(dtype)[:, : size[1]], torch.randn(size[1]).to(dtype)
    close(rms_norm(x, weight, 1e-5, unit_offset), rms_norm_reference(x, weight, 1e-5, unit_offset))


@can_compile
@compiled
@pytest.mark.parametrize("size", [(1, 64), (3, 33), (700, 80)])
def test_silu_and_mul(dtype: torch.dtype, size: tuple[int, int]) -> None:
    x = torch.randn(size[0], 2 * size[1] + 2).to(dtype)[:, : 2 * size[1]] * 20
    x[0, :3] = torch.tensor([-float("inf"), -300.0, 300.0])
    x[0, size[1]] = 0.0
    close(act_and_mul(x[:, 1:-1], "silu"), act_and_mul_reference(x[:, 1:-1], "silu"))


@can_compile
@compiled
@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_rotate_and_store(dtype: torch.dtype, rotary_dim: int) -> None:
    tokens, heads, kv_heads, dim = 5, 6, 2, 16
    rows = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    query, key, value = rows.split_with_sizes([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    angles = torch.randn(tokens, rotary_dim // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    cache = torch.zeros(2, 3, 4, kv_heads, dim).to(dtype)
    slots = torch.tensor([7, 0, -1, 11, 5])
    assert can_rotate_and_store(value, cache)
    found = rotate_and_store_cpu(query, key, value, rotary_tables(cos, sin), cache, slots)
    close(found, rotary_embedding_reference(query.view(tokens, heads, dim), cos, sin))
    expected = torch.zeros_like(cache)
    turned = rotary_embedding_reference(key.view(tokens, kv_heads, dim), cos, sin)
    store_kv_cache_reference(turned, value.view(tokens, kv_heads, dim), expected, slots)
    close(cache, expected)


@can_compile
@compiled
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("num_seqs", [1, 9])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 64), (3, 3, 80), (8, 1, 16)])
def test_decode_attention(
    dtype: torch.dtype, window: int | None, num_seqs: int, heads: int, kv_heads: int, dim: int
) -> None:
    contexts = torch.randint(1, 200, (num_seqs,), dtype=torch.int32)
    blocks = torch.randperm(num_seqs * 25).view(num_seqs, 25).int()
    cache = torch.randn(2, num_seqs * 25, 8, kv_heads, dim).to(dtype)
    query = torch.randn(num_seqs, heads, dim + 2).to(dtype)[..., :dim] * 3
    assert can_decode(query, cache, 1)
    bounds = torch.arange(num_seqs + 1, dtype=torch.int32)
    batch = PagedBatch(blocks, contexts, bounds, 1, int(contexts.max()))
    found = decode_attention_cpu(query, cache, blocks, contexts, 0.3, window)
    close(found, paged_attention_reference(query, cache, batch, AttentionTraits(0.3, window)))


@can_compile
@compiled
def test_argmax(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7001).to(dtype)[:, 1:]
    x[1, 500], x[1, 900] = 9.0, 9.0
    x[2] = -float("inf")
    x[3, 6999] = 9.0
    x[4, 77] = float("nan")
    found = argmax(x)
    assert found.tolist() == [int(x[0].float().argmax()), 500, 0, 6999, 77]


@can_compile
@compiled
def test_tokens_are_drawn_as_the_cumulative_distribution_has_them(dtype: torch.dtype) -> None:
    num_rows, vocab_size = 64, 5003
    logits = (3 * torch.randn(num_rows, vocab_size + 1)).to(dtype)[:, 1:]
    logits[:, 100:4000] = -float("inf")
    temperature = torch.linspace(0.2, 2.0, num_rows)
    uniform = torch.rand(num_rows, dtype=torch.float64)
    found = draw_tokens(logits, temperature, uniform)
    share = torch.softmax(logits.double() / temperature.double().unsqueeze(-1), dim=-1).cumsum(-1)
    rows = torch.arange(num_rows)
    # float32 likelihoods: a number so near an edge may go to the neighbour
    assert (share[rows, found] > uniform - 1e-5).all()
    before = torch.where(found > 0, share[rows, (found - 1).clamp(min=0)], 0.0)
    assert (before <= uniform + 1e-5).all()
    assert not ((found >= 100) & (found < 4000)).any()
    agreeing = found == draw_tokens_reference(logits, temperature, uniform)
    assert agreeing.float().mean() > 0.95


@can_compile
@compiled
def test_drawing_at_the_edges(dtype: torch.dtype) -> None:
    logits = torch.full((4, 3000), -float("inf"), dtype=dtype)
    logits[0, 2999] = 5.0
    logits[1, 7] = logits[1, 2000] = -1e4
    logits[2, 7] = logits[2, 2000] = 1e4
    logits[3, 0], logits[3, 1] = 0.0, -1.0
    temperature = torch.tensor([1.0, 1.0, 1.0, 1e-40])
    uniform = torch.tensor([0.0, 0.49, 0.51, 1 - 2.0**-48], dtype=torch.float64)
    assert draw_tokens(logits, temperature, uniform).tolist() == [2999, 7, 2000, 0]
