"""Packed weights compute what plain ones do."""

import pytest
import torch
from torch import nn

from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import ColumnParallelLinear, RowParallelLinear
from porter.runtime.layers.packing import can_pack, pack_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 40])
def test_packing_changes_no_output(dtype: torch.dtype, num_tokens: int) -> None:
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
    packable = can_pack(next(model.parameters()))
    pack_weights(model)
    weight = next(model.parameters())
    assert weight.is_mkldnn == packable
    assert (weight.shape, weight.dtype) == ((40, 24), dtype)
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
