"""The attention layers on the paged cache against transformers' own attention arithmetic."""

import pytest
import torch
from torch import nn
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_pairs
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves

from porter.runtime.attention.paged import PagedAttention, PagedAttentionWithALiBi, PagedAttentionWithRoPE
from porter.runtime.errors import ConfigError
from porter.runtime.layers.alibi import get_alibi_slopes
from porter.runtime.layers.rope import RotaryEmbedding
from porter.runtime.loader import load_weights
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.parallel import run_ranks
from porter.runtime.resolution import WeightRules

TOKENS, HEADS, KV_HEADS, DIM, BLOCK_SIZE = 11, 4, 2, 16, 4
ROPE = {"rope_type": "default", "rope_theta": 100.0}
SCALING = 0.3


def whole(length: int = TOKENS) -> AttentionMetadata:
    return AttentionMetadata.for_sequences([length], [length], [[3, 0, 2]], BLOCK_SIZE)


def make_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * DIM)
    query, key, value = rows.split_with_sizes([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
    return query, key, value


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Plain causal attention of one sequence, rows as the layers take them."""
    q = query.reshape(TOKENS, -1, DIM).transpose(0, 1)
    k, v = (x.reshape(TOKENS, -1, DIM).transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0) for x in (key, value))
    scores = q @ k.transpose(1, 2) * SCALING + bias
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1).flatten(1)


def test_metadata_of_a_mixed_step() -> None:
    found = AttentionMetadata.for_sequences([2, 1, 3], [5, 4, 3], [[7, 2], [0], [5, 1, 9]], 4)
    assert found.slot_mapping.tolist() == [31, 8, 3, 20, 21, 22]
    assert found.block_tables.tolist() == [[7, 2, 0], [0, 0, 0], [5, 1, 9]]
    assert found.cu_seqlens_q.tolist() == [0, 2, 3, 6]
    assert (found.max_seqlen_q, found.max_context_len) == (3, 5)
    assert (found.slot_mapping.dtype, found.block_tables.dtype) == (torch.int64, torch.int32)


def test_what_layers_share_is_made_once() -> None:
    metadata, calls = whole(), []
    for _ in range(3):
        metadata.once("key", lambda: calls.append(1))
    assert calls == [1]


@pytest.mark.parametrize("flat", [True, False])
def test_plain_attention(flat: bool) -> None:
    query, key, value = make_rows()
    layer = PagedAttention(HEADS, DIM, SCALING, num_kv_heads=KV_HEADS)
    kv_cache = torch.full(layer.cache_shape(4, BLOCK_SIZE), 2.0e4)
    rows = (query, key, value) if flat else tuple(x.reshape(TOKENS, -1, DIM) for x in (query, key, value))
    torch.testing.assert_close(layer(*rows, kv_cache, whole()), dense(query, key, value))


@pytest.mark.parametrize("v_head_dim", [6, 24])
def test_values_may_be_narrower_or_wider_than_keys(v_head_dim: int) -> None:
    query, key, _ = make_rows()
    value = torch.randn(TOKENS, KV_HEADS * v_head_dim)
    layer = PagedAttention(HEADS, DIM, SCALING, num_kv_heads=KV_HEADS, v_head_dim=v_head_dim)
    kv_cache = torch.full(layer.cache_shape(4, BLOCK_SIZE), 2.0e4)
    found = layer(query, key, value, kv_cache, whole())
    assert found.shape == (TOKENS, HEADS * v_head_dim)
    for start in range(0, v_head_dim, 2):  # a part of the values at a time, padded to the size of a key
        part = value.view(TOKENS, KV_HEADS, -1)[..., start : start + 2]
        expected = dense(query, key, torch.nn.functional.pad(part, (0, DIM - 2)).flatten(1))
        got = found.view(TOKENS, HEADS, -1)[..., start : start + 2]
        torch.testing.assert_close(got, expected.view(TOKENS, HEADS, DIM)[..., :2])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope_attention(interleaved: bool, rotary_dim: int | None, dtype: torch.dtype) -> None:
    query, key, value = (x.to(dtype) for x in make_rows())
    positions = torch.arange(TOKENS)
    layer = PagedAttentionWithRoPE(
        HEADS,
        DIM,
        SCALING,
        rope_parameters=ROPE,
        max_position=64,
        num_kv_heads=KV_HEADS,
        rotary_dim=rotary_dim,
        interleaved=interleaved,
    )
    size = rotary_dim or DIM
    cos, sin = (x[None] for x in RotaryEmbedding(ROPE, DIM, 64, rotary_dim)(positions, torch.float32))
    q, k = (x.float().view(1, TOKENS, -1, DIM) for x in (query, key))
    rotate = rotate_pairs if interleaved else rotate_halves
    turned = rotate(q[..., :size], k[..., :size], cos, sin, unsqueeze_dim=2)
    q, k = (torch.cat((a, b[..., size:]), -1)[0] for a, b in zip(turned, (q, k), strict=True))
    kv_cache = torch.zeros(layer.cache_shape(4, BLOCK_SIZE), dtype=dtype)
    found = layer(positions, query, key, value, kv_cache, whole())
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float(), dense(q, k, value.float()), rtol=tolerance, atol=tolerance)


def test_partial_rotary_factor_sets_the_rotated_part() -> None:
    parameters = {**ROPE, "partial_rotary_factor": 0.25}
    layer = PagedAttentionWithRoPE(HEADS, 18, SCALING, rope_parameters=parameters, max_position=64)
    assert layer.rotary_emb is not None
    assert layer.rotary_emb.rotary_dim == 4


def test_layers_that_rotate_alike_share_their_embedding() -> None:
    def make(theta: float) -> PagedAttentionWithRoPE:
        return PagedAttentionWithRoPE(
            HEADS, DIM, SCALING, rope_parameters={**ROPE, "rope_theta": theta}, max_position=64
        )

    assert make(5.0).rotary_emb is make(5.0).rotary_emb
    assert make(5.0).rotary_emb is not make(6.0).rotary_emb


@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2])
def test_alibi_attention(bias_dtype: torch.dtype | None, size: int) -> None:
    query, key, value = make_rows()
    slopes = get_alibi_slopes(HEADS) * 1.7
    dtype = bias_dtype or torch.float32
    bias = (slopes.to(dtype)[:, None] * torch.arange(TOKENS).to(dtype)).float()[:, None]

    def run(rank: int) -> torch.Tensor:
        layer = PagedAttentionWithALiBi(
            HEADS // size,
            DIM,
            SCALING,
            alibi_slopes=slopes,
            num_kv_heads=KV_HEADS // size,
            bias_dtype=bias_dtype,
        ).to(torch.bfloat16)
        kv_cache = torch.zeros(layer.cache_shape(4, BLOCK_SIZE))
        out: torch.Tensor = layer(*(x.chunk(size, 1)[rank] for x in (query, key, value)), kv_cache, whole())
        return out

    expected = dense(query, key, value, bias)
    torch.testing.assert_close(torch.cat(run_ranks(size, run), 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2], ids=["all heads on every rank", "heads in shards"])
def test_sinks_are_loaded_for_the_heads_of_a_rank(size: int) -> None:
    sinks = torch.randn(HEADS)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sinks = nn.Parameter(torch.empty(HEADS), requires_grad=False)
            self.attn = PagedAttention(HEADS // size, DIM, SCALING, sinks=self.sinks)

    def run(_: int) -> torch.Tensor:
        layer = Attention()
        assert load_weights(layer, [("sinks", sinks)], WeightRules()) == {"sinks"}
        return layer.sinks

    first, second = run_ranks(2, run)
    torch.testing.assert_close(first if size == 1 else torch.cat((first, second)), sinks)


def test_bad_head_counts_are_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="num_heads = 4 does not divide by num_kv_heads = 3"):
        PagedAttention(4, DIM, SCALING, num_kv_heads=3)
    with pytest.raises(ConfigError, match=r"expected 4 ALiBi slopes, found \(3,\)"):
        PagedAttentionWithALiBi(4, DIM, SCALING, alibi_slopes=torch.ones(3))
