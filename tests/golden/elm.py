# Copyright 2021 The Elm authors. Licensed under the Apache License, Version 2.0.
#
# Ported from modeling_elm.py (sha256 00f74d7af597) by porter 0.1.0 for porter.runtime. Every edit and its reason: port.json.
"""Elm for the paged-attention runtime."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PretrainedConfig

from porter.runtime.attention.paged import PagedAttention
from porter.runtime.layers.activation import get_act_fn
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import ColumnParallelLinear, LinearMethod, QKVParallelLinear, RowParallelLinear
from porter.runtime.loader import WeightRules, load_weights
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.sampling import Sampler, SamplerOutput, SamplingMetadata


class ElmPositionEmbedding(nn.Embedding):
    """Learned positions; text never uses the first `offset` rows of the table."""

    def __init__(self, num_embeddings: int, embedding_dim: int, offset: int):
        self.offset = offset
        super().__init__(num_embeddings + offset, embedding_dim)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return super().forward(positions + self.offset)


class ElmAttention(nn.Module):
    def __init__(self, config: PretrainedConfig, layer_number: int, linear_method: LinearMethod | None = None):
        super().__init__()
        self.n_head = config.n_head
        self.head_size = config.n_embd // config.n_head
        if config.n_embd % config.n_head:
            raise ValueError(f"{config.n_head} heads do not divide {config.n_embd} dimensions")
        self.c_attn = QKVParallelLinear(
            config.n_embd, self.head_size, self.n_head, bias=True, linear_method=linear_method
        )
        self.c_proj = RowParallelLinear(config.n_embd, config.n_embd, linear_method=linear_method)
        self.attn = PagedAttention(
            self.c_attn.num_heads,
            self.head_size,
            (
                (
                    1.0 / float(layer_number + 1) / ((float(config.n_embd // config.n_head)) ** 0.5)
                    if config.scale_attn_weights
                    else 1.0 / float(layer_number + 1)
                )
                if config.scale_attn_by_inverse_layer_idx
                else 1.0 / ((float(config.n_embd // config.n_head)) ** 0.5) if config.scale_attn_weights else 1.0
            ),
            num_kv_heads=self.c_attn.num_kv_heads,
        )

    def forward(self, x: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: AttentionMetadata) -> torch.Tensor:
        query, key, value = self.c_attn.split(self.c_attn(x))

        return self.c_proj(self.attn(query, key, value, kv_cache, attn_metadata))


class ElmMLP(nn.Module):
    def __init__(self, n_inner, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.c_fc = ColumnParallelLinear(config.n_embd, n_inner, linear_method=linear_method)
        self.c_proj = RowParallelLinear(n_inner, config.n_embd, linear_method=linear_method)
        self.act = get_act_fn(config.activation_function)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act(self.c_fc(x))
        return self.c_proj(h)


class ElmBlock(nn.Module):
    def __init__(self, config: PretrainedConfig, layer_number: int, linear_method: LinearMethod | None = None):
        super().__init__()
        n_inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = ElmAttention(config, layer_number, linear_method=linear_method)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = ElmMLP(n_inner, config, linear_method=linear_method)

    def forward(self, x: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: AttentionMetadata) -> torch.Tensor:
        a = self.attn(self.ln_1(x), kv_cache, attn_metadata)  # a, present, (attentions)
        x = x + a
        m = self.mlp(self.ln_2(x))
        x = x + m
        return x


class ElmPreTrainedModel(nn.Module):

    def __init__(self):
        super().__init__()


class ElmModel(ElmPreTrainedModel):

    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.wte = VocabParallelEmbedding(config.vocab_size, config.n_embd, linear_method=linear_method)
        self.wpe = ElmPositionEmbedding(config.n_positions, config.n_embd, config.position_offset)
        self.h = nn.ModuleList(
            [ElmBlock(config, layer_number=i, linear_method=linear_method) for i in range(config.n_layer)]
        )
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        inputs_embeds = self.wte(input_ids)
        hidden_states = inputs_embeds + self.wpe(positions)
        for i, block in enumerate(self.h):
            hidden_states = block(hidden_states, kv_caches[i], attn_metadata)

        hidden_states = self.ln_f(hidden_states)
        return hidden_states


class ElmLMHeadModel(ElmPreTrainedModel):
    weight_rules = WeightRules(
        fused={"c_attn": "contiguous"},
        transposed=("c_attn", "c_fc", "c_proj"),
        tied={"lm_head.weight": "transformer.wte.weight"},
        skip=(
            "attention.bias",
            "attention.masked_bias",
            "attn.bias",
            "attn.masked_bias",
            "rotary_emb.inv_freq",
            "self_attn.bias",
            "self_attn.masked_bias",
        ),
        base_prefix="transformer",
    )

    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.config = config
        self.transformer = ElmModel(config, linear_method=linear_method)
        self.lm_head = ParallelLMHead(config.vocab_size, config.n_embd, bias=False, linear_method=linear_method)
        self.sampler = Sampler()

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        return self.transformer(input_ids, positions, kv_caches, attn_metadata)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_states)

    def sample(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        return self.sampler(logits, sampling_metadata)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.weight_rules)
