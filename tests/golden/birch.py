# Copyright 2026 The Birch authors. Licensed under the Apache License, Version 2.0.
#
# Ported from modeling_birch.py (sha256 60ccb2e3a3ce) by porter 0.1.0 for porter.runtime. Every edit and its reason: port.json.
"""Birch for the paged-attention runtime."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PretrainedConfig

from porter.runtime.attention.paged import PagedAttentionWithRoPE
from porter.runtime.layers.activation import get_act_and_mul
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import LinearMethod, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from porter.runtime.layers.norm import RMSNorm
from porter.runtime.loader import WeightRules, load_weights
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.sampling import Sampler, SamplerOutput, SamplingMetadata


class BirchMLP(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [config.ffn_hidden_size] * 2, bias=False, linear_method=linear_method
        )
        self.w_out = RowParallelLinear(
            config.ffn_hidden_size, config.hidden_size, bias=False, linear_method=linear_method
        )
        self.act = get_act_and_mul(config.hidden_activation)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.w_out(self.act(self.gate_up_proj(hidden_states)))


class BirchAttention(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.scaling = 1.0 / math.sqrt(self.head_dim)

        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            self.num_heads,
            self.num_key_value_heads,
            bias=config.attention_bias,
            linear_method=linear_method,
        )
        self.o_proj = RowParallelLinear(
            self.num_heads * self.head_dim, config.hidden_size, bias=config.attention_bias, linear_method=linear_method
        )
        # One norm over each head's own dimensions, shared by the heads
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps, unit_offset=True)
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps, unit_offset=True)
        self.attn = PagedAttentionWithRoPE(
            self.qkv_proj.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            rope_parameters=config.rope_parameters,
            max_position=config.max_position_embeddings,
            softcap=self.config.attn_softcap,
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)

        query_states, key_states, value_states = self.qkv_proj.split(self.qkv_proj(hidden_states))
        query_states = self.q_norm(query_states.view(hidden_shape))
        key_states = self.k_norm(key_states.view(hidden_shape))
        attn_output = self.attn(positions, query_states, key_states, value_states, kv_cache, attn_metadata)
        attn_output = self.o_proj(attn_output)
        return attn_output


class BirchDecoderLayer(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.attn = BirchAttention(config=config, linear_method=linear_method)
        self.mlp = BirchMLP(config, linear_method=linear_method)
        self.pre_attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, unit_offset=True)
        self.post_attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, unit_offset=True)
        self.pre_mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, unit_offset=True)
        self.post_mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, unit_offset=True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        attn_output = self.attn(positions, self.pre_attn_norm(hidden_states), kv_cache, attn_metadata)
        hidden_states = hidden_states + self.post_attn_norm(attn_output)
        return hidden_states + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(hidden_states)))


class BirchModel(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, linear_method=linear_method)
        self.layers = nn.ModuleList(
            [BirchDecoderLayer(config, linear_method=linear_method) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, unit_offset=True)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        hidden_states = self.embed_tokens(input_ids)

        # The embeddings are scaled by a number that was rounded to the working precision
        normalizer = torch.tensor(self.config.hidden_size**0.5, dtype=hidden_states.dtype)
        hidden_states = hidden_states * normalizer

        for i, decoder_layer in enumerate(self.layers):
            hidden_states = decoder_layer(hidden_states, positions, kv_caches[i], attn_metadata)

        hidden_states = self.norm(hidden_states)
        return hidden_states


class BirchForCausalLM(nn.Module):
    weight_rules = WeightRules(
        packed={"gate_up_proj": {"w_gate": 0, "w_in": 1}, "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"}},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        skip=("rotary_emb.inv_freq",),
        base_prefix="model",
    )

    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.config = config
        self.model = BirchModel(config, linear_method=linear_method)
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
        logits = self.lm_head(hidden_states)
        if self.config.final_softcap is not None:
            logits = logits / self.config.final_softcap
            logits = torch.tanh(logits)
            logits = logits * self.config.final_softcap

        return logits

    def sample(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        return self.sampler(logits, sampling_metadata)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.weight_rules)
