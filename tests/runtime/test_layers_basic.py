"""Norm, activations, ALiBi slopes and experts against transformers."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from porter.kernels.fused_moe import CASES as MOE_CASES
from porter.kernels.fused_moe import fused_moe_reference
from porter.runtime.errors import ConfigError
from porter.runtime.layers.activation import get_act_and_mul, get_act_fn
from porter.runtime.layers.alibi import get_alibi_slopes
from porter.runtime.layers.moe import FusedMoE
from porter.runtime.layers.norm import RMSNorm
from porter.runtime.parallel import run_ranks

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@dtypes
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_equals_transformers(unit_offset: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 48).to(dtype), torch.randn(48).to(dtype)
    theirs = Gemma2RMSNorm(48, eps=1e-5) if unit_offset else LlamaRMSNorm(48, eps=1e-5)
    ours = RMSNorm(48, eps=1e-5, unit_offset=unit_offset)
    theirs.weight.data = ours.weight.data = weight
    tolerance = 2e-6 if dtype == torch.float32 else 0
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_activations_equal_transformers(name: str) -> None:
    x = torch.linspace(-12, 12, 101) if name != "sqrtsoftplus" else torch.linspace(0.1, 12, 101)
    theirs, ours = ACT2FN[name].float(), get_act_fn(name)
    if isinstance(ours, nn.Module):
        ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["silu", "gelu_new", "relu2"])
def test_act_and_mul_gates_with_the_first_half(name: str) -> None:
    gate, up = torch.randn(2, 3, 8)
    torch.testing.assert_close(get_act_and_mul(name)(torch.cat((gate, up), -1)), ACT2FN[name](gate) * up)


@pytest.mark.parametrize("make", [get_act_fn, get_act_and_mul, lambda name: FusedMoE(2, 4, 4, name)])
def test_an_unknown_activation_is_one_clear_line(make: type) -> None:
    with pytest.raises(ConfigError, match="unknown activation 'swoosh'; known: gelu,"):
        make("swoosh")


@pytest.mark.parametrize("num_heads", [1, 2, 8, 12, 16, 71])
def test_alibi_slopes_equal_bloom(num_heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(get_alibi_slopes(num_heads), theirs)


@pytest.mark.parametrize("case", MOE_CASES)
@pytest.mark.parametrize("size", [1, 2])
@dtypes
def test_experts_equal_the_reference_on_any_number_of_ranks(
    case: dict[str, int], size: int, dtype: torch.dtype
) -> None:
    experts, hidden_size, inner = case["num_experts"], case["hidden_size"], case["intermediate_size"]
    gate, up = (torch.randn(2, experts, inner, hidden_size) / 4).to(dtype)
    down = (torch.randn(experts, hidden_size, inner) / 4).to(dtype)
    x = torch.randn(case["num_tokens"], hidden_size).to(dtype)
    weights, index = torch.rand(case["num_tokens"], experts).softmax(-1).topk(case["top_k"])

    def run(rank: int) -> torch.Tensor:
        layer = FusedMoE(experts, hidden_size, inner, "silu")
        layer.gate_up_proj.data = torch.cat([x.chunk(size, 1)[rank] for x in (gate, up)], 1)
        layer.down_proj.data = down.chunk(size, 2)[rank].contiguous()
        y: torch.Tensor = layer(x, index, weights)
        return y

    gate_up = torch.cat((gate, up), 1)
    expected = fused_moe_reference(x.float(), gate_up.float(), down.float(), index, weights, "silu")
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for output in run_ranks(size, run):
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)
