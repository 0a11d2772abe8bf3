"""The kernels of a decode step against their references, on every case: in triton's interpreter or on a GPU."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from porter.kernels import decode_attention as decode_module
from porter.kernels import fused_moe as moe_module
from porter.kernels import layer_norm as layer_norm_module
from porter.kernels import linear_row as row_module
from porter.kernels import rms_norm as norm_module
from porter.kernels import rotate_and_store as store_module
from porter.kernels import sample_tokens as sample_module
from porter.kernels import scaled_linear as scaled_module
from porter.kernels.backend import HAS_TRITON
from porter.kernels.int8_linear import quantize_int8
from porter.kernels.paged_attention import AttentionTraits, PagedBatch
from porter.kernels.rotate import HeadNorm, Rotation

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
# the interpreter truncates where it should round to bfloat16
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BLOCK_SIZE = 8


@pytest.fixture(autouse=True)
def _on_the_gpu_where_there_is_one() -> Iterator[None]:
    """Kernels are compiled where a GPU is, and interpreted elsewhere."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def make_norms(norm: bool | None, head_dim: int, dtype: torch.dtype) -> tuple[HeadNorm | None, HeadNorm | None]:
    """None for no norms, else whether weights have the unit offset."""
    if norm is None:
        return None, None
    first, second = (HeadNorm(torch.randn(head_dim).to(dtype), eps, norm) for eps in (1e-5, 1e-3))
    return first, second


def make_rotation(rotary_dim: int, dtype: torch.dtype, interleaved: bool) -> Rotation | None:
    if not rotary_dim:
        return None
    angles = torch.randn(400, rotary_dim // 2)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype), interleaved)


@pytest.mark.parametrize("case", row_module.CASES)
@pytest.mark.parametrize("scaled", [False, True])
@dtypes
def test_linear_row(case: dict[str, Any], scaled: bool, dtype: torch.dtype) -> None:
    rows = case["out_features"] * (1 if case["hidden_act"] is None else 2)
    x = torch.randn(1, case["in_features"]).to(dtype)
    weight = (torch.randn(rows, case["in_features"]) * case["in_features"] ** -0.5).to(dtype)
    scale = None
    if scaled:
        weight, scale = torch.randint(-127, 127, weight.shape, dtype=torch.int8), torch.rand(rows) * 2e-3
    bias = torch.randn(rows).to(dtype) if case["bias"] else None
    arguments = (x, weight, bias, scale, case["hidden_act"])
    assert_close(row_module._launch(*arguments), row_module.linear_row_reference(*arguments))


@pytest.mark.parametrize("case", norm_module.CASES)
@dtypes
def test_add_rms_norm(case: dict[str, Any], dtype: torch.dtype) -> None:
    x, residual = (torch.randn(case["num_tokens"], case["hidden_size"]).to(dtype) for _ in range(2))
    weight = torch.randn(case["hidden_size"]).to(dtype)
    normed, total = norm_module._launch_add(x, residual, weight, 1e-5, case["unit_offset"])
    assert_close(total, x + residual)
    assert_close(normed, norm_module.rms_norm_reference(x + residual, weight, 1e-5, case["unit_offset"]))


@pytest.mark.parametrize("case", layer_norm_module.CASES)
@dtypes
def test_add_layer_norm(case: dict[str, Any], dtype: torch.dtype) -> None:
    x, residual = (torch.randn(case["num_tokens"], case["hidden_size"]).to(dtype) * 3 + 1 for _ in range(2))
    weight, bias = (torch.randn(case["hidden_size"]).to(dtype) if case[name] else None for name in ("weight", "bias"))
    found = layer_norm_module._launch(x, residual, weight, bias, 1e-3)
    for each, expected in zip(
        found, layer_norm_module.add_layer_norm_reference(x, residual, weight, bias, 1e-3), strict=True
    ):
        assert_close(each, expected)


@pytest.mark.parametrize("case", scaled_module.CASES)
@pytest.mark.parametrize("quantize", [quantize_int8, scaled_module.quantize_fp8])
@dtypes
def test_scaled_linear(case: dict[str, Any], quantize: Any, dtype: torch.dtype) -> None:
    x = torch.randn(case["num_tokens"], case["in_features"]).to(dtype)
    weight, scale = quantize(torch.randn(case["out_features"], case["in_features"]) * case["in_features"] ** -0.5)
    bias = torch.randn(case["out_features"]).to(dtype) if case["bias"] else None
    found = scaled_module._launch(x, weight, scale, bias)
    wide = (x.float(), weight, scale, None if bias is None else bias.float())
    assert_close(found, scaled_module.scaled_linear_reference(*wide).to(dtype))


@pytest.mark.parametrize("case", store_module.CASES)
@dtypes
def test_rotate_and_store(case: dict[str, Any], dtype: torch.dtype) -> None:
    tokens, dim, (num_heads, num_kv_heads) = case["num_tokens"], case["head_dim"], case["heads"]
    packed = torch.randn(tokens, num_heads + 2 * num_kv_heads, dim).to(dtype)
    query, key, value = packed.split_with_sizes([num_heads, num_kv_heads, num_kv_heads], dim=1)
    slots = torch.randperm(4 * BLOCK_SIZE)[:tokens]
    slots[-1] = -1 if tokens > 1 else slots[-1]
    positions = torch.randint(0, 400, (tokens,))
    norms = make_norms(case["norm"], dim, dtype)
    rotation = make_rotation(case["rotary_dim"], dtype, case["interleaved"])
    found, expected = (torch.zeros(2, 4, BLOCK_SIZE, num_kv_heads, dim, dtype=dtype) for _ in range(2))
    out = store_module._launch(query, key, value, found, slots, positions, norms, rotation)
    reference = store_module.rotate_and_store_reference(query, key, value, expected, slots, positions, norms, rotation)
    assert_close(out, reference)
    assert_close(found, expected)


def decode_inputs(case: dict[str, Any], dtype: torch.dtype) -> tuple[list[Any], torch.Tensor]:
    heads, kv_heads, dim = case["heads"]
    contexts = case["contexts"]
    counts = [-(-context // BLOCK_SIZE) for context in contexts]
    blocks = torch.randperm(sum(counts) + 2).int()
    tables = torch.full((len(contexts), max(counts) + 1), 2**31 - 1, dtype=torch.int32)
    for row, taken in zip(tables, blocks[: sum(counts)].split_with_sizes(counts), strict=True):
        row[: len(taken)] = taken
    lens = torch.tensor(contexts, dtype=torch.int32)
    last = (lens - 1).clamp(min=0).long()
    slots = tables.gather(1, (last // BLOCK_SIZE)[:, None])[:, 0].long() * BLOCK_SIZE + last % BLOCK_SIZE
    slots[lens == 0] = -1
    batch = PagedBatch(tables, lens, torch.arange(len(contexts) + 1).int(), 1, max(contexts))
    options = dict(case["traits"])
    sinks = torch.randn(heads).to(dtype) if options.pop("sinks", False) else None
    slopes = torch.rand(heads) * 0.1 if options.pop("alibi", False) else None
    packed = torch.randn(len(contexts), heads + 2 * kv_heads, dim).to(dtype)
    query, key, value = packed.split_with_sizes([heads, kv_heads, kv_heads], dim=1)
    cache = torch.randn(2, sum(counts) + 2, BLOCK_SIZE, kv_heads, dim).to(dtype)
    norms = make_norms(case["norm"], dim, dtype)
    rotation = make_rotation(case["rotary_dim"], dtype, interleaved=False)
    traits = AttentionTraits(dim**-0.5, **options)
    return [query, key, value, cache, slots, last, batch, traits, norms, rotation, sinks, slopes], cache


@pytest.mark.parametrize("case", decode_module.CASES)
@dtypes
def test_decode_attention(case: dict[str, Any], dtype: torch.dtype) -> None:
    arguments, cache = decode_inputs(case, dtype)
    projections, given = arguments[:3], arguments[4:]
    run: Any = partial(decode_module._launch, ranges=case["ranges"])
    reference: Any = decode_module.decode_attention_reference
    expected_cache = cache.clone()
    expected = reference(*projections, expected_cache, *given)
    assert_close(run(*projections, cache, *given), expected)
    assert_close(cache, expected_cache)
    # a second launch finds the counters as the first one did
    slots, positions, batch, traits, norms, rotation, sinks, slopes = given
    prepare: Any = store_module.rotate_and_store_reference
    ready = prepare(*projections, cache.clone(), slots, positions, norms, rotation)
    again = (cache, slots, positions, batch, traits, (None, None), None, sinks, slopes, torch.empty_like(ready))
    assert_close(run(ready, *projections[1:], *again), expected)


@pytest.mark.parametrize("case", sample_module.CASES)
def test_sampling_is_greedy_at_temperature_0(case: dict[str, Any]) -> None:
    logits = torch.randn(case["num_rows"], case["vocab_size"])
    temperature, seeds = torch.zeros(case["num_rows"]), torch.arange(case["num_rows"])
    found = sample_module.sample_tokens(logits, temperature, seeds)
    assert found.tolist() == logits.argmax(-1).tolist()


def test_sampling_draws_from_the_softmax() -> None:
    num_rows, vocab_size, temperature = 1000, 5, 0.7
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    rows = logits.expand(num_rows, vocab_size).contiguous()
    seeds = torch.arange(num_rows) * 2**33 + 7
    found = sample_module.sample_tokens(rows, torch.full((num_rows,), temperature), seeds)
    shares = torch.bincount(found, minlength=vocab_size) / num_rows
    expected = (logits / temperature).softmax(0)
    # four standard deviations of a share
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / num_rows).sqrt()).all()
    again = sample_module.sample_tokens(rows[5:9], torch.full((4,), temperature), seeds[5:9])
    assert again.tolist() == found[5:9].tolist()


@pytest.mark.parametrize("case", [*moe_module.CASES, {**moe_module.CASES[0], "num_tokens": 90, "num_experts": 2}])
@pytest.mark.parametrize("hidden_act", ["silu", "gelu_pytorch_tanh"])
@dtypes
def test_experts(case: dict[str, Any], hidden_act: str, dtype: torch.dtype) -> None:
    tokens, experts, hidden, inner = (
        case[name] for name in ("num_tokens", "num_experts", "hidden_size", "intermediate_size")
    )
    x = torch.randn(tokens, hidden).to(dtype)
    gate_up = (torch.randn(experts, 2 * inner, hidden) * hidden**-0.5).to(dtype)
    down = (torch.randn(experts, hidden, inner) * inner**-0.5).to(dtype)
    scores, chosen = torch.randn(tokens, experts).softmax(-1).topk(case["top_k"])
    found = moe_module._launch(x, gate_up, down, chosen, scores, hidden_act)
    reference = moe_module.fused_moe_reference(
        x.float(), gate_up.float(), down.float(), chosen, scores.float(), hidden_act
    )
    assert_close(found, reference.to(dtype))
