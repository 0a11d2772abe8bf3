"""Packed weights compute what plain ones do."""

import pytest
import torch
from torch import nn

from porter.kernels.panel_linear import can_pack_panels
from porter.runtime.layers import packing
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import ColumnParallelLinear, LinearMethod, RowParallelLinear
from porter.runtime.layers.packing import MkldnnMethod, PanelMethod, can_pack_mkldnn, pack_weights
from porter.runtime.layers.sharding import Part
from porter.runtime.quantization.int8 import METHOD


@pytest.mark.parametrize("panels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 40])
def test_packing_changes_no_output(
    dtype: torch.dtype, num_tokens: int, panels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not panels:
        monkeypatch.setattr(packing, "can_pack_panels", lambda weight, dtype: False)
    torch.set_default_dtype(dtype)
    try:
        model = nn.Sequential(ColumnParallelLinear(24, 40), RowParallelLinear(40, 24, bias=False))
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    wide = torch.randn(num_tokens, 30).to(dtype)
    x = wide[:, :24]
    expected = model(x)
    weight = next(model.parameters())
    wanted = PanelMethod if can_pack_panels(weight, dtype) and panels else MkldnnMethod
    kind = wanted if wanted is PanelMethod or can_pack_mkldnn(weight) else LinearMethod
    pack_weights(model)
    assert {type(getattr(layer, "linear_method", None)).__name__ for layer in model} == {kind.__name__}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


def test_a_shared_embedding_stays_readable() -> None:
    embedding, head = VocabParallelEmbedding(30, 16), ParallelLMHead(30, 16)
    embedding.weight.normal_()
    head.tie_weights(embedding)
    ids, hidden = torch.tensor([3, 29]), torch.randn(2, 16)
    expected = head(hidden)
    pack_weights(nn.ModuleList([embedding, head]))
    torch.testing.assert_close(embedding(ids), embedding.weight[ids])
    torch.testing.assert_close(head(hidden), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packing_int8_changes_no_output(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        layer = ColumnParallelLinear(24, 40, linear_method=METHOD)
    finally:
        torch.set_default_dtype(torch.float32)
    METHOD.load_part(layer, "weight", Part((40, 24)), torch.randn(40, 24))
    x = torch.randn(5, 24).to(dtype)
    expected = layer(x)
    packable = can_pack_panels(layer.weight, dtype)
    pack_weights(layer)
    assert isinstance(layer.linear_method, PanelMethod) == packable
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(layer(x), expected, rtol=tolerance, atol=tolerance)
