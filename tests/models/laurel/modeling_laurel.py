# Copyright 2026 The Laurel authors. Licensed under the Apache License, Version 2.0.
"""Laurel: layers that keep a state (a short convolution and a decaying sum) between layers of attention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_kernel_func_from_hub_with_fallback
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .configuration_laurel import LaurelConfig

logger = logging.get_logger(__name__)


class LaurelRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class LaurelMLP(nn.Module):
    def __init__(self, config: LaurelConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)))


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    return hidden_states.repeat_interleave(n_rep, dim=1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    key_states = repeat_kv(key, module.num_key_value_groups)
    value_states = repeat_kv(value, module.num_key_value_groups)
    attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_output = torch.matmul(attn_weights, value_states)
    return attn_output.transpose(1, 2).contiguous(), attn_weights


class LaurelAttention(nn.Module):
    def __init__(self, config: LaurelConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self, query_states, key_states, value_states, attention_mask, scaling=self.scaling, **kwargs
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


def hide_padding(hidden_states, attention_mask):
    if attention_mask is not None:
        hidden_states = hidden_states * attention_mask[:, :, None]
    return hidden_states


@use_kernel_func_from_hub_with_fallback("decay_scan", "laurel_kernels")
def decay_scan(inputs, decay, initial_state=None, **kwargs):
    state = torch.zeros_like(inputs[:, 0]) if initial_state is None else initial_state
    outputs = []
    for step in range(inputs.shape[1]):
        state = decay * state + inputs[:, step]
        outputs.append(state)
    return torch.stack(outputs, dim=1), state


class LaurelMixer(nn.Module):
    """A short convolution, then a sum that decays."""

    def __init__(self, config: LaurelConfig, layer_idx: int, initialize_weights: bool = True):
        super().__init__()
        self.layer_idx = layer_idx
        self.conv_kernel_size = config.conv_kernel
        self.act = ACT2FN[config.hidden_act]
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
        if initialize_weights and self.decay.device.type != "meta":
            self.init_decay()

    @torch.no_grad()
    def init_decay(self):
        init.uniform_(self.decay, -1.0, 1.0)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        seq_len = hidden_states.shape[1]
        has_state = cache_params is not None and cache_params.has_previous_state(self.layer_idx)
        hidden_states = hide_padding(hidden_states, attention_mask)
        projected, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        if self.training and cache_params is None:
            logger.warning_once("training is slow")

        projected = projected.transpose(1, 2)
        if has_state and seq_len == 1 and not cache_params.layers[self.layer_idx].record_past:
            # one token: the window moves on by one
            window = cache_params.layers[self.layer_idx].conv_states[0]
            window.copy_(torch.cat([window[..., 1:], projected], dim=-1))
            mixed = (window * self.conv1d.weight[:, 0]).sum(-1, keepdim=True) + self.conv1d.bias[:, None]
        else:
            if cache_params is not None:
                projected = cache_params.update_conv_state(
                    projected, self.layer_idx, conv_kernel_size=self.conv_kernel_size
                )
            mixed = self.conv1d(projected)[..., : projected.shape[-1]]
            if cache_params is not None:
                mixed = mixed[..., -seq_len:]
        mixed = self.act(mixed).transpose(1, 2)

        before = cache_params.layers[self.layer_idx].recurrent_states[0] if has_state else None
        mixed, state = decay_scan(mixed, torch.sigmoid(self.decay), initial_state=before, **kwargs)
        if cache_params is not None:
            cache_params.update_recurrent_state(state, self.layer_idx)
        return self.out_proj(mixed * F.silu(gate))


class LaurelDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LaurelConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        if self.layer_type == "linear_attention":
            self.mixer = LaurelMixer(config, layer_idx)
        else:
            self.self_attn = LaurelAttention(config, layer_idx)
        self.mlp = LaurelMLP(config)
        self.input_layernorm = LaurelRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LaurelRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        if self.layer_type == "linear_attention":
            hidden_states = self.mixer(hidden_states, cache_params=past_key_values, attention_mask=attention_mask)
        else:
            hidden_states, _ = self.self_attn(
                hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
            )
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LaurelPreTrainedModel(PreTrainedModel):
    config: LaurelConfig
    base_model_prefix = "model"
    _no_split_modules = ["LaurelDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LaurelMixer):
            module.init_decay()


class LaurelModel(LaurelPreTrainedModel):
    def __init__(self, config: LaurelConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([LaurelDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LaurelRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask_kwargs = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }
        masks = {
            "full_attention": create_causal_mask(**mask_kwargs),
            "linear_attention": create_recurrent_attention_mask(**mask_kwargs),
        }
        hidden_states = inputs_embeds
        for i, decoder_layer in enumerate(self.layers):
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=masks[self.config.layer_types[i]],
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class LaurelForCausalLM(LaurelPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = LaurelModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, slice_indices, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


__all__ = ["LaurelForCausalLM", "LaurelModel", "LaurelPreTrainedModel"]
