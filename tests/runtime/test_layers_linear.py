"""Parallel linears: shards of every rank together are the whole layer."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from porter.runtime.errors import ConfigError
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from porter.runtime.loader import WeightRules, load_weights
from porter.runtime.parallel import all_gather, run_ranks

SIZES = pytest.mark.parametrize("size", [1, 2, 4])


def load(layer: nn.Module, **tensors: torch.Tensor) -> None:
    model = nn.Module()
    model.layer = layer
    load_weights(model, [(f"layer.{name}", tensor) for name, tensor in tensors.items()], WeightRules())


def apply(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = layer(x)
    return y


@SIZES
def test_column_shards_concatenate_to_the_whole_output(size: int) -> None:
    weight, bias, x = torch.randn(8, 6), torch.randn(8), torch.randn(3, 6)

    def rank_output(_: int) -> torch.Tensor:
        layer = ColumnParallelLinear(6, 8)
        load(layer, weight=weight, bias=bias)
        return apply(layer, x)

    torch.testing.assert_close(torch.cat(run_ranks(size, rank_output), -1), linear(x, weight, bias))


@SIZES
def test_row_shards_sum_to_the_whole_output_with_one_bias(size: int) -> None:
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(3, 8)

    def rank_output(rank: int) -> torch.Tensor:
        layer = RowParallelLinear(8, 6)
        load(layer, weight=weight, bias=bias)
        return apply(layer, x.chunk(size, -1)[rank])

    for output in run_ranks(size, rank_output):
        torch.testing.assert_close(output, linear(x, weight, bias))


def test_replicated_is_whole_on_every_rank() -> None:
    weight, x = torch.randn(5, 6), torch.randn(3, 6)

    def rank_output(_: int) -> torch.Tensor:
        layer = ReplicatedLinear(6, 5, bias=False)
        load(layer, weight=weight)
        return apply(layer, x)

    for output in run_ranks(2, rank_output):
        torch.testing.assert_close(output, linear(x, weight))


@SIZES
def test_merged_column_splits_into_its_shards(size: int) -> None:
    weights, x = [torch.randn(8, 6), torch.randn(4, 6)], torch.randn(3, 6)

    def rank_output(_: int) -> tuple[torch.Tensor, ...]:
        layer = MergedColumnParallelLinear(6, [8, 4], bias=False)
        load(layer, weight=torch.cat(weights))
        return layer.split(layer(x))

    outputs = run_ranks(size, rank_output)
    for shard, weight in enumerate(weights):
        torch.testing.assert_close(torch.cat([out[shard] for out in outputs], -1), linear(x, weight))


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 2), (8, 2, 2), (8, 2, 4), (4, 1, 4), (6, 3, 3)])
def test_qkv_shards_hold_their_heads_and_replicate_kv_heads(heads: int, kv_heads: int, size: int) -> None:
    dim = 4
    q, k, v = (torch.randn(n * dim, 10) for n in (heads, kv_heads, kv_heads))

    def rank_weights(_: int) -> tuple[torch.Tensor, int, int]:
        layer = QKVParallelLinear(10, dim, heads, kv_heads, bias=False)
        load(layer, weight=torch.cat((q, k, v)))
        return layer.get_parameter("weight"), layer.num_heads, layer.num_kv_heads

    for rank, (weight, local_heads, local_kv_heads) in enumerate(run_ranks(size, rank_weights)):
        assert (local_heads, local_kv_heads) == (heads // size, max(kv_heads // size, 1))
        first_kv = rank * local_heads // (heads // kv_heads)
        kv_rows = slice(first_kv * dim, (first_kv + local_kv_heads) * dim)
        expected = torch.cat((q[rank * local_heads * dim :][: local_heads * dim], k[kv_rows], v[kv_rows]))
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ColumnParallelLinear(6, 7),
        lambda: RowParallelLinear(7, 6),
        lambda: MergedColumnParallelLinear(6, [6, 7]),
        lambda: QKVParallelLinear(6, 2, 3),
        lambda: QKVParallelLinear(6, 2, 4, 3),
    ],
)
def test_sizes_that_do_not_divide_are_one_clear_line(make: Callable[[], LinearBase]) -> None:
    with pytest.raises(ConfigError, match=r"does not divide by .*; "):
        run_ranks(2, lambda _: make())


def test_more_ranks_than_kv_heads_must_be_a_multiple() -> None:
    with pytest.raises(ConfigError, match="not a multiple of num_kv_heads = 2"):
        run_ranks(3, lambda _: QKVParallelLinear(6, 2, 6, 2))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_embedding_and_head_hide_the_vocabulary_padding(size: int) -> None:
    vocab, weight, bias = 9, torch.randn(9, 6), torch.randn(9)
    ids, hidden = torch.tensor([0, 8, 3, 5]), torch.randn(2, 6)

    def outputs(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        embedding, head = VocabParallelEmbedding(vocab, 6), ParallelLMHead(vocab, 6, bias=True)
        load(embedding, weight=weight)
        load(head, weight=weight, bias=bias)
        return embedding(ids), head(hidden)

    for embedded, logits in run_ranks(size, outputs):
        torch.testing.assert_close(embedded, weight[ids])
        torch.testing.assert_close(logits, linear(hidden, weight, bias))


def test_a_tied_head_is_the_embedding() -> None:
    embedding, head = VocabParallelEmbedding(9, 6), ParallelLMHead(9, 6)
    head.tie_weights(embedding)
    assert head.weight is embedding.weight
    with pytest.raises(ConfigError, match="can't share"):
        ParallelLMHead(8, 6).tie_weights(embedding)


def test_ranks_gather_in_order_and_report_the_first_failure() -> None:
    gathered = run_ranks(3, lambda rank: all_gather(torch.tensor([rank])))
    assert [part.tolist() for part in gathered] == [[0, 1, 2]] * 3

    def fail(rank: int) -> torch.Tensor:
        if rank == 1:
            raise ValueError("rank 1 broke")
        return all_gather(torch.zeros(1))

    with pytest.raises(ValueError, match="rank 1 broke"):
        run_ranks(3, fail)
