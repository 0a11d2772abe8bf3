# Copyright 2024 The Juniper authors. Licensed under the Apache License, Version 2.0.
#
# Ported from modeling_juniper.py (sha256 72d35bdb755f) by porter 0.1.0 for porter.runtime. Every edit and its reason: port.json.
"""Juniper for the paged-attention runtime."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PretrainedConfig

from porter.runtime.attention.paged import PagedAttentionWithRoPE
from porter.runtime.layers.activation import get_act_and_mul
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import LinearMethod, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from porter.runtime.layers.rope import get_rope_parameters
from porter.runtime.loader import WeightRules, load_weights
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.sampling import Sampler, SamplerOutput, SamplingMetadata


class JuniperRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, device=None))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


class JuniperMLP(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [config.intermediate_size] * 2, bias=False, linear_method=linear_method
        )
        self.w2 = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=False, linear_method=linear_method
        )
        self.act_fn = get_act_and_mul(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act_fn(self.gate_up_proj(x)))


class JuniperAttention(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.W_pack = QKVParallelLinear(
            self.hidden_size, self.head_dim, self.num_heads, bias=config.qkv_bias, linear_method=linear_method
        )
        self.o_proj = RowParallelLinear(
            self.num_heads * self.head_dim, self.hidden_size, bias=False, linear_method=linear_method
        )
        self.attn = PagedAttentionWithRoPE(
            self.W_pack.num_heads,
            self.head_dim,
            1.0 / math.sqrt(self.head_dim),
            num_kv_heads=self.W_pack.num_kv_heads,
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
        query_states, key_states, value_states = self.W_pack.split(self.W_pack(hidden_states))
        attn_output = self.attn(positions, query_states, key_states, value_states, kv_cache, attn_metadata)
        return self.o_proj(attn_output)


class JuniperDecoderLayer(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.self_attn = JuniperAttention(config=config, linear_method=linear_method)
        self.mlp = JuniperMLP(config, linear_method=linear_method)
        self.input_layernorm = JuniperRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = JuniperRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

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
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.mlp(self.post_attention_layernorm(hidden_states))
        hidden_states = residual + hidden_states
        return hidden_states


class JuniperModel(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, linear_method=linear_method)
        self.layers = nn.ModuleList(
            [JuniperDecoderLayer(config, linear_method=linear_method) for _ in range(config.num_hidden_layers)]
        )
        self.norm = JuniperRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

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


class JuniperForCausalLM(nn.Module):
    weight_rules = WeightRules(
        packed={"gate_up_proj": {"w1": 0, "w3": 1}},
        fused={"W_pack": "contiguous"},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        skip=("rotary_emb.inv_freq",),
        base_prefix="model",
    )

    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.config = config
        self.model = JuniperModel(config, linear_method=linear_method)
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
        logits = logits.float()
        return logits

    def sample(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        return self.sampler(logits, sampling_metadata)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.weight_rules)
