"""fp8 weights: close to the float layer, equal to their own dequantised form, the same on any number of ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from porter.kernels.scaled_linear import FP8, dequantize, quantize_fp8
from porter.runtime.engine import SamplingParams
from porter.runtime.errors import EngineError, WeightError
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import ColumnParallelLinear, RowParallelLinear
from porter.runtime.layers.moe import FusedMoE
from porter.runtime.loader import load_weights
from porter.runtime.parallel import run_ranks
from porter.runtime.quantization.registry import get_linear_method
from porter.runtime.resolution import WeightRules

METHOD = get_linear_method("fp8")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_rounding_is_within_half_a_step_of_three_bits(scale: float) -> None:
    weight = torch.randn(7, 33) * scale
    weight[3] = 0
    stored, scales = quantize_fp8(weight)
    assert stored.dtype == FP8
    error = (dequantize(stored, scales, torch.float32) - weight).abs()
    # below the least normal number, 2^-6, steps are 2^-9
    assert bool((error <= torch.maximum(weight.abs() / 16, scales[:, None] * 2**-10) * 1.001).all())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_are_slices_of_the_whole_layer(size: int) -> None:
    weight, bias, x = torch.randn(8, 12), torch.randn(8), torch.randn(3, 12)
    expected = linear(x, dequantize(*quantize_fp8(weight), torch.float32), bias)

    def run(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        column = ColumnParallelLinear(12, 8, linear_method=METHOD)
        row = RowParallelLinear(12, 8, linear_method=METHOD)
        for layer in (column, row):
            load_weights(nn.ModuleDict({"x": layer}), [("x.weight", weight), ("x.bias", bias)], WeightRules())
        return column(x), row(x.chunk(size, -1)[rank])

    outputs = run_ranks(size, run)
    torch.testing.assert_close(torch.cat([column for column, _ in outputs], -1), expected, rtol=1e-4, atol=1e-5)
    for _, row in outputs:
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_embedding_and_head_use_what_is_stored() -> None:
    model = nn.ModuleDict(
        {
            "embed": VocabParallelEmbedding(9, 12, linear_method=METHOD),
            "head": ParallelLMHead(9, 12, linear_method=METHOD),
        }
    )
    weight, hidden = torch.randn(9, 12), torch.randn(2, 12)
    load_weights(model, [("embed.weight", weight)], WeightRules(tied={"head.weight": "embed.weight"}))
    stored = dequantize(*quantize_fp8(weight), torch.float32)
    torch.testing.assert_close(model["embed"](torch.tensor([8, 0])), stored[[8, 0]])
    torch.testing.assert_close(model["head"](hidden), linear(hidden, stored), rtol=1e-4, atol=1e-5)


def test_experts_are_quantized_one_by_one() -> None:
    layers = [FusedMoE(3, 12, 8, "silu", linear_method=method) for method in (None, METHOD)]
    tensors = {"gate_up_proj": torch.randn(3, 16, 12), "down_proj": torch.randn(3, 12, 8)}
    x, index, weights = torch.randn(5, 12), torch.randint(0, 3, (5, 2)), torch.rand(5, 2)
    for layer in layers:
        load_weights(nn.ModuleDict({"x": layer}), [(f"x.{k}", v) for k, v in tensors.items()], WeightRules())
    exact, rounded = (layer(x, index, weights) for layer in layers)
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.08


def test_fp8_answers_nearly_alike(tiny_llama: Any, serve: Any) -> None:
    params = SamplingParams(temperature=0, logprobs=0, max_tokens=1, ignore_eos=True)
    exact, rounded = (
        serve(tiny_llama(2).folder, quantization=name)
        .generate([{"prompt_token_ids": [5, 9, 3, 7]}], params, use_tqdm=False)[0]
        .outputs[0]
        for name in (None, "fp8")
    )
    assert rounded.cumulative_logprob == pytest.approx(exact.cumulative_logprob, abs=0.5)
    assert rounded.cumulative_logprob != exact.cumulative_logprob


def test_dummy_weights_of_8_bits_run(tiny_llama: Any, serve: Any) -> None:
    llm = serve(tiny_llama(2).folder, quantization="fp8", load_format="dummy")
    assert len(llm.generate([{"prompt_token_ids": [5, 9]}], use_tqdm=False)[0].outputs[0].token_ids) > 0


def test_a_checkpoint_that_is_stored_quantized_is_refused(tiny_llama: Any, serve: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama(2).folder, tmp_path / "stored")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(EngineError, match="stored quantized"):
        serve(folder)


def test_a_tensor_of_8_bits_is_refused() -> None:
    layer = nn.ModuleDict({"x": ColumnParallelLinear(12, 8, bias=False, linear_method=METHOD)})
    with pytest.raises(WeightError, match="not floats"):
        load_weights(layer, [("x.weight", torch.zeros(8, 12, dtype=FP8))], WeightRules())
