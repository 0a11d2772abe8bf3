# Copyright 2022 The Hazel authors. Licensed under the Apache License, Version 2.0.
#
# Ported from modeling_hazel.py (sha256 932e0600c874) by porter 0.1.0 for porter.runtime. Every edit and its reason: port.json.
"""Hazel for the paged-attention runtime."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PretrainedConfig

from porter.runtime.attention.paged import PagedAttention
from porter.runtime.layers.activation import get_act_fn
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import (
    ColumnParallelLinear,
    LinearMethod,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from porter.runtime.loader import WeightRules, load_weights
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.sampling import Sampler, SamplerOutput, SamplingMetadata


class HazelLearnedPositions(nn.Embedding):
    """A vector for every position, counted over the tokens that are no padding."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        # Two rows were once kept for padding, and every checkpoint still has them
        self.offset = 2
        super().__init__(num_embeddings + self.offset, embedding_dim)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return super().forward(positions + self.offset)


class HazelAttention(nn.Module):
    """Attention of a decoder, which could also attend to an encoder, though no Hazel ever had one"""

    def __init__(self, embed_dim: int, num_heads: int, bias: bool = True, linear_method: LinearMethod | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.qkv_proj = QKVParallelLinear(
            embed_dim, self.head_dim, self.num_heads, bias=bias, linear_method=linear_method
        )
        self.out_proj = RowParallelLinear(embed_dim, embed_dim, bias=bias, linear_method=linear_method)
        self.attn = PagedAttention(self.qkv_proj.num_heads, self.head_dim, 1.0, num_kv_heads=self.qkv_proj.num_kv_heads)

    def forward(
        self, hidden_states: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        # The query is scaled, not the product
        query, key, value = self.qkv_proj.split(self.qkv_proj(hidden_states))
        query = query * self.scaling
        # embed_dim is asked of the module, since the last axis may be split over devices
        context = self.attn(query, key, value, kv_cache, attn_metadata)
        return self.out_proj(context)


class HazelDecoderLayer(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.self_attn = HazelAttention(
            embed_dim=config.hidden_size,
            num_heads=config.num_attention_heads,
            bias=config.enable_bias,
            linear_method=linear_method,
        )
        affine = config.layer_norm_elementwise_affine
        self.do_layer_norm_before = config.do_layer_norm_before
        self.activation_fn = get_act_fn(config.activation_function)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, elementwise_affine=affine)
        self.fc1 = ColumnParallelLinear(
            config.hidden_size, config.ffn_dim, bias=config.enable_bias, linear_method=linear_method
        )
        self.fc2 = RowParallelLinear(
            config.ffn_dim, config.hidden_size, bias=config.enable_bias, linear_method=linear_method
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, elementwise_affine=affine)

    def forward(
        self, hidden_states: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        residual = hidden_states
        # All sizes but one have their norms in front
        if self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states = self.self_attn(hidden_states, kv_cache, attn_metadata)
        hidden_states = residual + hidden_states
        if not self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.fc2(self.activation_fn(self.fc1(hidden_states)))
        hidden_states = residual + hidden_states
        if not self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)

        return hidden_states


class HazelDecoder(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.word_embed_proj_dim, linear_method=linear_method
        )
        self.embed_positions = HazelLearnedPositions(config.max_position_embeddings, config.hidden_size)

        if config.word_embed_proj_dim != config.hidden_size:
            self.project_in = ReplicatedLinear(
                config.word_embed_proj_dim, config.hidden_size, bias=False, linear_method=linear_method
            )
            self.project_out = ReplicatedLinear(
                config.hidden_size, config.word_embed_proj_dim, bias=False, linear_method=linear_method
            )
        else:
            self.project_in = None
            self.project_out = None

        # With the norms behind, the last layer ends in one already
        if config.do_layer_norm_before and not config._remove_final_layer_norm:
            self.final_layer_norm = nn.LayerNorm(
                config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine
            )
        else:
            self.final_layer_norm = None

        self.layers = nn.ModuleList(
            [HazelDecoderLayer(config, linear_method=linear_method) for _ in range(config.num_hidden_layers)]
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        inputs_embeds = self.embed_tokens(input_ids)
        pos_embeds = self.embed_positions(positions)

        if self.project_in is not None:
            inputs_embeds = self.project_in(inputs_embeds)
        hidden_states = inputs_embeds + pos_embeds

        for i, decoder_layer in enumerate(self.layers):

            hidden_states = decoder_layer(hidden_states, kv_caches[i], attn_metadata)

        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        if self.project_out is not None:
            hidden_states = self.project_out(hidden_states)
        return hidden_states


class HazelModel(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.decoder = HazelDecoder(config, linear_method=linear_method)


class HazelForCausalLM(nn.Module):
    weight_rules = WeightRules(
        packed={"qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"}},
        tied={"lm_head.weight": "model.decoder.embed_tokens.weight"},
        skip=("decoder.version", "rotary_emb.inv_freq"),
        base_prefix="model",
    )

    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.config = config
        self.model = HazelModel(config, linear_method=linear_method)
        # shares its weight with the embeddings
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.word_embed_proj_dim, bias=False, linear_method=linear_method
        )
        self.sampler = Sampler()

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        # The decoder inside the model is asked directly
        return self.model.decoder(input_ids, positions, kv_caches, attn_metadata)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_states)

    def sample(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        return self.sampler(logits, sampling_metadata)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.weight_rules)
