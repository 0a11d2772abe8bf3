# Copyright 2026 The Acorn authors. Licensed under the Apache License, Version 2.0.
#
# Ported from modeling_acorn.py (sha256 c57db3ec5872) by porter 0.1.0 for porter.runtime. Every edit and its reason: port.json.
"""Acorn for the paged-attention runtime."""

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


class AcornMLP(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [config.intermediate_size] * 2, bias=False, linear_method=linear_method
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=False, linear_method=linear_method
        )
        self.act_fn = get_act_and_mul(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)))


class AcornAttention(nn.Module):
    def __init__(self, config: PretrainedConfig, layer_idx: int, linear_method: LinearMethod | None = None):
        super().__init__()
        self.head_dim = config.head_dim
        self.scaling = config.query_pre_attn_scalar**-0.5
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=True,
            linear_method=linear_method,
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim, config.hidden_size, bias=False, linear_method=linear_method
        )
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.attn = PagedAttentionWithRoPE(
            self.qkv_proj.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            rope_parameters=config.rope_parameters,
            max_position=config.max_position_embeddings,
            sliding_window=self.sliding_window,
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        query_states, key_states, value_states = self.qkv_proj.split(self.qkv_proj(hidden_states))

        attn_output = self.attn(positions, query_states, key_states, value_states, kv_cache, attn_metadata)
        return self.o_proj(attn_output)


class AcornDecoderLayer(nn.Module):
    def __init__(self, config: PretrainedConfig, layer_idx: int, linear_method: LinearMethod | None = None):
        super().__init__()
        self.self_attn = AcornAttention(config, layer_idx, linear_method=linear_method)
        self.mlp = AcornMLP(config, linear_method=linear_method)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states = self.self_attn(positions, hidden_states, kv_cache, attn_metadata)
        # Acorn damps what a layer adds
        hidden_states = residual + hidden_states * 0.5

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return residual + hidden_states * 0.5


class AcornModel(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, linear_method=linear_method)
        self.layers = nn.ModuleList(
            [AcornDecoderLayer(config, i, linear_method=linear_method) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        inputs_embeds = self.embed_tokens(input_ids)

        hidden_states = inputs_embeds * self.config.embedding_multiplier

        for i, decoder_layer in enumerate(self.layers):
            hidden_states = decoder_layer(positions, hidden_states, kv_caches[i], attn_metadata)

        hidden_states = self.norm(hidden_states)
        return hidden_states


class AcornForCausalLM(nn.Module):
    weight_rules = WeightRules(
        packed={
            "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
            "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
        },
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        skip=("rotary_emb.inv_freq",),
        base_prefix="model",
    )

    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.config = config
        self.model = AcornModel(config, linear_method=linear_method)
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
        return self.lm_head(hidden_states)

    def sample(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        return self.sampler(logits, sampling_metadata)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.weight_rules)
