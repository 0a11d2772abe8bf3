# Copyright 2026 The Laurel authors. Licensed under the Apache License, Version 2.0.
#
# Ported from modeling_laurel.py (sha256 89976a725547) by porter 0.1.0 for porter.runtime. Every edit and its reason: port.json.
"""Laurel for the paged-attention runtime."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from porter.runtime.attention.paged import PagedAttention
from porter.runtime.layers.activation import get_act_fn
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import ColumnParallelLinear, LinearMethod, QKVParallelLinear, RowParallelLinear
from porter.runtime.layers.norm import RMSNorm
from porter.runtime.layers.state import StateMixer, States
from porter.runtime.loader import WeightRules, load_weights
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.sampling import Sampler, SamplerOutput, SamplingMetadata


class LaurelMLP(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.up_proj = ColumnParallelLinear(
            config.hidden_size, config.intermediate_size, bias=False, linear_method=linear_method
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=False, linear_method=linear_method
        )
        self.act_fn = get_act_fn(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


class LaurelAttention(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            linear_method=linear_method,
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim, config.hidden_size, bias=False, linear_method=linear_method
        )
        self.attn = PagedAttention(
            self.qkv_proj.num_heads, self.head_dim, self.scaling, num_kv_heads=self.qkv_proj.num_kv_heads
        )

    def forward(
        self, hidden_states: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        query_states, key_states, value_states = self.qkv_proj.split(self.qkv_proj(hidden_states))
        attn_output = self.attn(query_states, key_states, value_states, kv_cache, attn_metadata)
        return self.o_proj(attn_output)


def hide_padding(hidden_states, attention_mask):
    if attention_mask is not None:
        hidden_states = hidden_states * attention_mask[:, :, None]
    return hidden_states


def decay_scan(inputs, decay, initial_state=None, **kwargs):
    state = torch.zeros_like(inputs[:, 0]) if initial_state is None else initial_state
    outputs = []
    for step in range(inputs.shape[1]):
        state = decay * state + inputs[:, step]
        outputs.append(state)
    return torch.stack(outputs, dim=1), state


class LaurelMixer(StateMixer):
    """A short convolution, then a sum that decays."""

    resumes = True

    def __init__(self, config: PretrainedConfig, layer_idx: int, initialize_weights: bool = True):
        super().__init__()
        self.layer_idx = layer_idx
        self.conv_kernel_size = config.conv_kernel
        self.act = get_act_fn(config.hidden_act)
        self.conv1d = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            kernel_size=config.conv_kernel,
            groups=config.hidden_size,
            padding=config.conv_kernel - 1,
        )
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.decay = nn.Parameter(torch.empty(config.hidden_size))
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def mix(self, hidden_states: torch.Tensor, states: States) -> torch.Tensor:
        seq_len = hidden_states.shape[1]
        has_state = states.has_previous_state
        hidden_states = hide_padding(hidden_states, None)
        projected, gate = self.in_proj(hidden_states).chunk(2, dim=-1)

        projected = projected.transpose(1, 2)
        if has_state and seq_len == 1:
            # one token: the window moves on by one
            window = states.conv_states[0]
            window.copy_(torch.cat([window[..., 1:], projected], dim=-1))
            mixed = (window * self.conv1d.weight[:, 0]).sum(-1, keepdim=True) + self.conv1d.bias[:, None]
        else:
            projected = states.update_conv_state(projected, conv_kernel_size=self.conv_kernel_size)
            mixed = self.conv1d(projected)[..., : projected.shape[-1]]
            mixed = mixed[..., -seq_len:]
        mixed = self.act(mixed).transpose(1, 2)

        before = states.recurrent_states[0] if has_state else None
        mixed, state = decay_scan(mixed, torch.sigmoid(self.decay), initial_state=before)
        states.update_recurrent_state(state)
        return self.out_proj(mixed * F.silu(gate))


class LaurelDecoderLayer(nn.Module):
    def __init__(self, config: PretrainedConfig, layer_idx: int, linear_method: LinearMethod | None = None):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        if self.layer_type == "linear_attention":
            self.mixer = LaurelMixer(config, layer_idx)
        else:
            self.self_attn = LaurelAttention(config, linear_method=linear_method)
        self.mlp = LaurelMLP(config, linear_method=linear_method)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attn_metadata: AttentionMetadata, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        if self.layer_type == "linear_attention":
            hidden_states = self.mixer(hidden_states, attn_metadata)
        else:
            hidden_states = self.self_attn(hidden_states, kv_cache, attn_metadata)
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LaurelModel(nn.Module):
    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, linear_method=linear_method)
        self.layers = nn.ModuleList(
            [LaurelDecoderLayer(config, i, linear_method=linear_method) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, input_ids: torch.Tensor, attn_metadata: AttentionMetadata, kv_caches: list[torch.Tensor]
    ) -> torch.Tensor:
        hidden_states = self.embed_tokens(input_ids)
        for i, decoder_layer in enumerate(self.layers):
            hidden_states = decoder_layer(hidden_states, attn_metadata, kv_caches[i])
        return self.norm(hidden_states)


class LaurelForCausalLM(nn.Module):
    weight_rules = WeightRules(
        packed={"qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"}},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        skip=("rotary_emb.inv_freq",),
        base_prefix="model",
    )

    def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
        super().__init__()
        self.config = config
        self.model = LaurelModel(config, linear_method=linear_method)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, bias=False, linear_method=linear_method)
        self.sampler = Sampler()

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        return self.model(input_ids, attn_metadata, kv_caches)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_states)

    def sample(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        return self.sampler(logits, sampling_metadata)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.weight_rules)
