"""int8 weights: close to the float layer, equal to their own dequantised form, the same on any number of ranks."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from porter.kernels.int8_linear import CASES, int8_linear, quantize_int8
from porter.kernels.scaled_linear import dequantize, scaled_linear_reference
from porter.runtime.errors import ConfigError
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import ColumnParallelLinear, LinearMethod, QKVParallelLinear, RowParallelLinear
from porter.runtime.layers.moe import FusedMoE
from porter.runtime.loader import load_weights
from porter.runtime.parallel import run_ranks
from porter.runtime.quantization.int8 import Int8LinearMethod
from porter.runtime.quantization.registry import get_linear_method
from porter.runtime.resolution import WeightRules

METHOD = get_linear_method("int8")
RULES = WeightRules(packed={"qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"}})


def test_methods_are_found_by_name() -> None:
    assert isinstance(METHOD, Int8LinearMethod)
    for name in ("fp3", "registry", "../int8"):
        with pytest.raises(ConfigError, match="unknown quantization"):
            get_linear_method(name)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_rounding_is_within_half_a_step(scale: float) -> None:
    weight = torch.randn(7, 33) * scale
    weight[3] = 0
    quantized, scales = quantize_int8(weight)
    assert quantized.dtype == torch.int8
    error = (dequantize(quantized, scales, torch.float32) - weight).abs()
    assert bool((error <= scales[:, None] * 0.5001).all())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cpu_path_equals_the_reference(case: dict[str, int], dtype: torch.dtype) -> None:
    weight, scale = quantize_int8(torch.randn(case["out_features"], case["in_features"]))
    bias = torch.randn(case["out_features"]).to(dtype) if case["bias"] else None
    x = torch.randn(case["num_tokens"], case["in_features"]).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    expected = scaled_linear_reference(x.float(), weight, scale, None if bias is None else bias.float())
    found = int8_linear(x, weight, scale, bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * 8)


def load(layer: nn.Module, tensors: dict[str, torch.Tensor], name: str = "layer") -> None:
    load_weights(nn.ModuleDict({name: layer}), [(f"{name}.{k}", v) for k, v in tensors.items()], RULES)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_are_slices_of_the_whole_layer(size: int) -> None:
    weight, bias, x = torch.randn(8, 12), torch.randn(8), torch.randn(3, 12)
    quantized, scale = quantize_int8(weight)
    expected = linear(x, dequantize(quantized, scale, torch.float32), bias)

    def run(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        column = ColumnParallelLinear(12, 8, linear_method=METHOD)
        row = RowParallelLinear(12, 8, linear_method=METHOD)
        load(column, {"weight": weight, "bias": bias})
        load(row, {"weight": weight, "bias": bias})
        return column(x), row(x.chunk(size, -1)[rank])

    outputs = run_ranks(size, run)
    torch.testing.assert_close(torch.cat([column for column, _ in outputs], -1), expected, rtol=1e-4, atol=1e-5)
    for _, row in outputs:
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_packed_projections_keep_each_shards_scales(size: int) -> None:
    q, k, v = torch.randn(16, 12), torch.randn(8, 12) * 10, torch.randn(8, 12) / 10

    def run(_: int) -> torch.Tensor:
        layer = QKVParallelLinear(12, 4, 4, 2, bias=False, linear_method=METHOD)
        model = nn.ModuleDict({"qkv_proj": layer})
        load_weights(model, [("q_proj.weight", q), ("k_proj.weight", k), ("v_proj.weight", v)], RULES)
        assert isinstance(layer.linear_method, Int8LinearMethod)
        return layer.linear_method.dequantize(layer)

    for rank, found in enumerate(run_ranks(size, run)):
        rows = [x[rank * n // size :][: max(n // size, 4)] for x, n in ((q, 16),)]
        kv_first = rank * 8 // size // 4 * 4
        rows += [x[kv_first : kv_first + max(8 // size, 4)] for x in (k, v)]
        expected = torch.cat(rows)
        torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) / 127)


def test_embedding_head_and_tie_share_scales() -> None:
    class Port(nn.Module):
        def __init__(self, method: LinearMethod) -> None:
            super().__init__()
            self.embed = VocabParallelEmbedding(9, 12, linear_method=method)
            self.lm_head = ParallelLMHead(9, 12, linear_method=method)

    weight, hidden = torch.randn(9, 12), torch.randn(2, 12)
    port = Port(METHOD)
    filled = load_weights(port, [("embed.weight", weight)], WeightRules(tied={"lm_head.weight": "embed.weight"}))
    assert filled == {"embed.weight", "lm_head.weight"}
    stored = dequantize(*quantize_int8(weight), torch.float32)
    torch.testing.assert_close(port.embed(torch.tensor([8, 0])), stored[[8, 0]])
    torch.testing.assert_close(port.lm_head(hidden), linear(hidden, stored), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_experts_are_quantized_one_by_one(size: int) -> None:
    gate_up, down = torch.randn(3, 16, 12), torch.randn(3, 12, 8)
    x, index, weights = torch.randn(5, 12), torch.randint(0, 3, (5, 2)), torch.rand(5, 2)

    def run(_: int, method: LinearMethod | None = METHOD) -> torch.Tensor:
        layer = FusedMoE(3, 12, 8, "silu", linear_method=method)
        load(layer, {"gate_up_proj": gate_up, "down_proj": down}, "experts")
        y: torch.Tensor = layer(x, index, weights)
        return y

    expected = run(0, None)
    for output in run_ranks(size, run):
        assert float((output - expected).norm() / expected.norm()) < 0.02
    torch.testing.assert_close(run_ranks(size, run)[0], run(0), rtol=1e-4, atol=1e-4)
