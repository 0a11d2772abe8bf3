# Copyright 2026 The Cedar authors. Licensed under the Apache License, Version 2.0.
#
# Ported from modeling_cedar.py (sha256 b40018a01f9c) by porter 0.1.0 for porter.runtime. Every edit and its reason: port.json.
"""Cedar for the paged-attention runtime."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from porter.runtime.attention.paged import PagedAttentionWithRoPE
from porter.runtime.layers.activation import get_act_and_mul
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import LinearMethod, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from porter.runtime.layers.moe import FusedMoE
from porter.runtime.layers.norm import RMSNorm
from porter.runtime.loader import WeightRules, load_weights
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.sampling import Sampler, SamplerOutput, SamplingMetadata


class CedarMLP(nn.Module):
    def __init__(self, config: PretrainedConfig, intermediate_size=None, linear_method: LinearMethod | None = None):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            self.hidden_size, [self.intermediate_size] * 2, bias=False, linear_method=linear_method
        )
        self.down_proj = RowParallelLinear(
            self.intermediate_size, self.hidden_size, bias=False, linear_method=linear_method
        )
        self.act_fn = get_act_and_mul(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)))


class CedarTopKRouter(nn.Module):
    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(self.num_experts, self.hidden_dim))

    def forward(self, hidden_states: torch.Tensor):
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        router_logits = F.linear(hidden_states, self.weight)
        routing_weights = F.softmax(router_logits, dim=-1, dtype=torch.float)
        top_k_weights, top_k_index = torch.topk(routing_weights, self.top_k, dim=-1)
        if self.norm_topk_prob:
            top_k_weights /= top_k_weights.sum(dim=-1, keepdim=True)
        return router_logits, top_k_weights.to(hidden_states.dtype), top_k_index


class CedarSparseMoeBlock(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.gate = CedarTopKRouter(config)
        self.experts = FusedMoE(
            config.num_local_experts,
            config.hidden_size,
            config.moe_intermediate_size,
            config.hidden_act,
            linear_method=linear_method,
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        _, top_k_weights, top_k_index = self.gate(hidden_states)
        return self.experts(hidden_states, top_k_index, top_k_weights)


class CedarAttention(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, self.head_dim, self.num_heads, bias=False, linear_method=linear_method
        )
        self.o_proj = RowParallelLinear(
            self.num_heads * self.head_dim, config.hidden_size, bias=False, linear_method=linear_method
        )
        self.attn = PagedAttentionWithRoPE(
            self.qkv_proj.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            rope_parameters=config.rope_parameters,
            max_position=config.max_position_embeddings,
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
        attn_output = self.o_proj(attn_output)
        return attn_output


class CedarDecoderLayer(nn.Module):
    def __init__(self, config: PretrainedConfig, layer_idx: int, linear_method: LinearMethod | None = None):
        super().__init__()
        self.self_attn = CedarAttention(config, linear_method=linear_method)
        if layer_idx < config.first_dense_layers:
            self.mlp = CedarMLP(config, linear_method=linear_method)
        else:
            self.mlp = CedarSparseMoeBlock(config, linear_method=linear_method)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        attn_output = self.self_attn(positions, self.input_layernorm(hidden_states), kv_cache, attn_metadata)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class CedarModel(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, linear_method=linear_method)
        self.layers = nn.ModuleList(
            [CedarDecoderLayer(config, i, linear_method=linear_method) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        hidden_states = self.embed_tokens(input_ids)

        for i, decoder_layer in enumerate(self.layers):
            hidden_states = decoder_layer(positions, hidden_states, kv_caches[i], attn_metadata)

        return self.norm(hidden_states)


class CedarForCausalLM(nn.Module):
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
        self.model = CedarModel(config, linear_method=linear_method)
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
