# Copyright 2023 The Dogwood authors. Licensed under the Apache License, Version 2.0.
#
# Ported from modeling_dogwood.py (sha256 c292451dc7df) by porter 0.1.0 for porter.runtime. Every edit and its reason: port.json.
"""Dogwood for the paged-attention runtime."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from porter.runtime.attention.paged import PagedAttentionWithRoPE
from porter.runtime.layers.activation import get_act_and_mul
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import LinearMethod, MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from porter.runtime.layers.norm import RMSNorm
from porter.runtime.layers.rope import get_rope_parameters
from porter.runtime.loader import WeightRules, load_weights
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.sampling import Sampler, SamplerOutput, SamplingMetadata


class DogwoodFeedForward(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.config = config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [config.ffn_size] * 2, bias=False, linear_method=linear_method
        )
        self.w2 = RowParallelLinear(config.ffn_size, config.hidden_size, bias=False, linear_method=linear_method)
        self.act = get_act_and_mul(config.activation)

    def forward(self, x: torch.Tensor):
        n = self.config.weight_slices
        if n > 1:
            # Reproduces the order of additions of a training run that was spread over n devices
            size = self.config.ffn_size // n
            rows1, rows3 = self.w1.weight.split(size, dim=0), self.w3.weight.split(size, dim=0)
            columns = self.w2.weight.split(size, dim=1)
            parts = [F.linear(self.act(F.linear(x, rows1[i])) * F.linear(x, rows3[i]), columns[i]) for i in range(n)]
            return sum(parts)
        return self.w2(self.act(self.gate_up_proj(x)))


class DogwoodAttention(nn.Module):
    """Self-attention with rotary positions and, if the configuration says so, fewer heads for keys and values"""

    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        kv_size = self.num_kv_heads * self.head_dim
        self.q_proj = ReplicatedLinear(
            self.hidden_size, self.hidden_size, bias=config.qkv_bias, linear_method=linear_method
        )
        self.k_proj = ReplicatedLinear(self.hidden_size, kv_size, bias=config.qkv_bias, linear_method=linear_method)
        self.v_proj = ReplicatedLinear(self.hidden_size, kv_size, bias=config.qkv_bias, linear_method=linear_method)
        self.o_proj = ReplicatedLinear(self.hidden_size, self.hidden_size, bias=False, linear_method=linear_method)
        self.attn = PagedAttentionWithRoPE(
            self.num_heads,
            self.head_dim,
            1.0 / math.sqrt(self.head_dim),
            num_kv_heads=self.num_kv_heads,
            rope_parameters=get_rope_parameters(config),
            max_position=config.max_position_embeddings,
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        query_states = self.q_proj(hidden_states)
        key_states = self.k_proj(hidden_states)
        value_states = self.v_proj(hidden_states)
        context = self.attn(positions, query_states, key_states, value_states, kv_cache, attn_metadata)
        return self.o_proj(context)


class DogwoodDecoderLayer(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.attention = DogwoodAttention(config, linear_method=linear_method)
        self.feed_forward = DogwoodFeedForward(config, linear_method=linear_method)
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        attn_output = self.attention(positions, self.attention_norm(hidden_states), kv_cache, attn_metadata)
        hidden_states = hidden_states + attn_output
        hidden_states = hidden_states + self.feed_forward(self.ffn_norm(hidden_states))

        return hidden_states


class DogwoodModel(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, linear_method=linear_method)
        self.layers = nn.ModuleList(
            [DogwoodDecoderLayer(config, linear_method=linear_method) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        positions = positions.long()

        hidden_states = self.embed_tokens(input_ids)

        for i, decoder_layer in enumerate(self.layers):

            hidden_states = decoder_layer(positions, hidden_states, kv_caches[i], attn_metadata)

        hidden_states = self.norm(hidden_states)
        return hidden_states


class DogwoodForCausalLM(nn.Module):
    weight_rules = WeightRules(
        packed={"gate_up_proj": {"w1": 0, "w3": 1}},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        skip=("attention.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
        base_prefix="model",
    )

    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.config = config
        self.model = DogwoodModel(config, linear_method=linear_method)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, bias=False, linear_method=linear_method)
        self.sampler = Sampler()

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, kv_caches, attn_metadata)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_states).float()

    def sample(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        return self.sampler(logits, sampling_metadata)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.weight_rules)
