"""What a GPU computes, in triton's interpreter: the fused path of a port against its plain path, prefill and decode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from porter.kernels.backend import HAS_TRITON, INTERPRETED, interpreting
from porter.runtime.deferred import Deferred, Sum, materialize
from porter.runtime.errors import EngineError
from porter.runtime.layers.activation import get_act_and_mul
from porter.runtime.layers.linear import LinearOutput, MergedColumnParallelLinear, RowParallelLinear
from porter.runtime.layers.norm import NormedHeads, RMSNorm
from porter.runtime.layers.scaled import ScaledLinearMethod
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.model_registry import load_port
from porter.runtime.quantization.registry import get_linear_method

pytestmark = pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="needs triton and its interpreter")
GOLDEN = Path(__file__).parents[1] / "golden"
BLOCK_SIZE = 4


def fill(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def run_port(model: Any, fused: bool) -> torch.Tensor:
    """Hidden states of a prefill of three sequences, a mixed step and a decode step, one below the other."""
    tables = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    layers = [m for m in model.modules() if hasattr(m, "cache_shape")]
    caches = [torch.zeros(layer.cache_shape(12, BLOCK_SIZE)) for layer in layers]
    generator = torch.Generator().manual_seed(3)
    found = []
    for query_lens, context_lens in (([5, 7], [5, 7]), ([1, 1, 6], [6, 8, 6]), ([1, 1, 1], [7, 9, 7]), ([1], [8])):
        metadata = AttentionMetadata.for_sequences(query_lens, context_lens, tables[: len(query_lens)], BLOCK_SIZE)
        spans = zip(query_lens, context_lens, strict=True)
        positions = torch.cat([torch.arange(context - query, context) for query, context in spans])
        ids = torch.randint(3, 50, (len(positions),), generator=generator)
        if fused:
            with interpreting():
                found.append(materialize(model(ids, positions, caches, metadata)))
        else:
            found.append(model(ids, positions, caches, metadata))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["acorn", "birch", "cedar"])
@torch.no_grad()
def test_the_fused_path_equals_the_plain_one(name: str, tiny_model: Callable[[str], Any]) -> None:
    tiny = tiny_model(name)
    model = load_port(GOLDEN / f"{name}.py")(tiny.config_class()).eval()
    fill(model)
    torch.testing.assert_close(run_port(model, fused=True), run_port(model, fused=False), rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_an_addition_and_the_norm_behind_it_are_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, norm, x, residual = RowParallelLinear(8, 8), RMSNorm(8), torch.randn(3, 8), torch.randn(3, 8)
    fill(linear)
    expected = norm(residual + linear(x))
    with interpreting():
        total = residual + linear(x)
        assert isinstance(total, Sum)
        assert total.is_pending
        torch.testing.assert_close(norm(total), expected)
        assert not total.is_pending
        torch.testing.assert_close(total * 1, residual + linear(x) * 1)


@torch.no_grad()
def test_an_addition_and_a_layer_norm_of_torch_are_one_kernel() -> None:
    linear, norm, x, residual = RowParallelLinear(8, 8), nn.LayerNorm(8), torch.randn(3, 8), torch.randn(3, 8)
    fill(linear)
    fill(norm, 1)
    expected = norm(residual + linear(x))
    with interpreting():
        total = residual + linear(x)
        found = norm(total)
        assert not total.is_pending
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(total * 1, residual + linear(x) * 1)
        # normalised otherwise than over whole rows, it is the plain sum
        plain = residual + linear(x)
        torch.testing.assert_close(nn.LayerNorm([3, 8])(plain), nn.LayerNorm([3, 8])(plain * 1))


@torch.no_grad()
def test_one_row_is_activated_by_the_linear() -> None:
    linear, act = MergedColumnParallelLinear(8, [4, 4], bias=False), get_act_and_mul("silu")
    fill(linear)
    x = torch.randn(1, 8)
    expected = act(linear(x))
    with interpreting():
        pending = linear(x)
        assert isinstance(pending, LinearOutput)
        torch.testing.assert_close(act(pending), expected)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("name", ["int8", "fp8"])
@torch.no_grad()
def test_weights_of_8_bits_keep_their_scales(name: str, num_rows: int) -> None:
    method = get_linear_method(name)
    assert isinstance(method, ScaledLinearMethod)
    linear = MergedColumnParallelLinear(8, [4, 4], bias=False, linear_method=method)
    weight, scale = method.quantize(torch.randn(8, 8) * torch.arange(1, 9)[:, None])
    linear.weight.copy_(weight)
    linear.get_parameter("weight_scale").copy_(scale)
    act, x = get_act_and_mul("silu"), torch.randn(num_rows, 8)
    dense = method.dequantize(linear)
    with interpreting():
        torch.testing.assert_close(linear(x) * 1, x @ dense.T)
        torch.testing.assert_close(act(linear(x)), act(x @ dense.T))


@torch.no_grad()
def test_a_deferred_result_is_an_ordinary_tensor_to_anyone_else() -> None:
    norm, x = RMSNorm(8), torch.randn(2, 3, 8)
    expected = norm(x)
    with interpreting():
        heads = norm(x)
        assert isinstance(heads, NormedHeads)
        assert (heads.shape, heads.dtype, heads.size(-1), heads.dim(), len(heads)) == (x.shape, x.dtype, 8, 3, 2)
        assert heads.is_pending
        torch.testing.assert_close(heads.view(6, 8), expected.view(6, 8))
        first, _ = torch.cat((heads, heads)).chunk(2)
        torch.testing.assert_close(first, expected)
        changed: torch.Tensor = heads.add_(1)
        assert not isinstance(changed, Deferred)
        torch.testing.assert_close(changed, expected + 1)
        torch.testing.assert_close(heads * 1, expected + 1)


@torch.no_grad()
def test_changing_an_input_in_place_is_noticed() -> None:
    linear, x = RowParallelLinear(8, 8), torch.randn(3, 8)
    with interpreting():
        pending = linear(x)
        x += 1
        with pytest.raises(EngineError, match="in place"):
            pending.sum()


def test_nothing_is_deferred_where_changes_can_not_be_noticed() -> None:
    linear, x = RowParallelLinear(8, 8), torch.randn(3, 8)
    with interpreting(), torch.inference_mode():
        assert not isinstance(linear(x), Deferred)
    with interpreting(), torch.enable_grad():
        assert not isinstance(linear(x), Deferred)
