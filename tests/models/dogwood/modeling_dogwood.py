# coding=utf-8
# Copyright 2023 The Dogwood authors. Licensed under the Apache License, Version 2.0.
""" PyTorch Dogwood model."""
import math
from typing import List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn import CrossEntropyLoss
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.utils import add_start_docstrings, add_start_docstrings_to_model_forward, logging
from transformers.utils.import_utils import is_torch_fx_available

from .configuration_dogwood import DogwoodConfig

if is_torch_fx_available():
    import torch.fx

logger = logging.get_logger(__name__)

DOGWOOD_DOCSTRING = r"""
    A plain `torch.nn.Module` with the loading and saving of [`PreTrainedModel`].

    Args:
        config ([`DogwoodConfig`]): sizes and switches of the model
"""


def _causal_bias(shape, dtype, device, past_length=0):
    """0 where a query may look, the dtype's most negative number where it may not: [batch, 1, query, key]."""
    batch, length = shape
    future = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    bias = torch.zeros(length, length, dtype=dtype, device=device)
    bias = bias.masked_fill(future, torch.finfo(dtype).min)
    if past_length > 0:
        bias = torch.cat((bias.new_zeros(length, past_length), bias), dim=-1)
    return bias.expand(batch, 1, length, length + past_length)


def _padding_bias(mask, dtype, length):
    """[batch, key] of ones and zeros to [batch, 1, query, key] of zeros and most negative numbers."""
    hidden = mask[:, None, None, :].expand(mask.shape[0], 1, length, mask.shape[1]) == 0
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


class DogwoodNorm(nn.Module):
    def __init__(self, size, eps):
        """Root mean square, without a mean or a bias"""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states):
        wide = hidden_states.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(hidden_states.dtype)


ALL_LAYERNORM_LAYERS.append(DogwoodNorm)


class DogwoodRotaryEmbedding(torch.nn.Module):
    def __init__(self, dim, max_position_embeddings=128, base=10000.0, stretch=1.0, device=None):
        super().__init__()
        self.stretch = stretch
        inv_freq = base ** -(torch.arange(0, dim, 2, device=device).float() / dim)
        self.register_buffer("inv_freq", inv_freq)
        self._build_tables(max_position_embeddings)

    def _build_tables(self, seq_len):
        self.max_seq_len_cached = seq_len
        t = torch.arange(seq_len, device=self.inv_freq.device, dtype=self.inv_freq.dtype) / self.stretch
        freqs = torch.einsum("i,j->ij", t, self.inv_freq)
        # Not the layout of the paper: the two halves are rotated, not neighbours
        angles = torch.cat((freqs, freqs), dim=-1)
        self.register_buffer("cos_cached", angles.cos()[None, None, :, :], persistent=False)
        self.register_buffer("sin_cached", angles.sin()[None, None, :, :], persistent=False)

    def forward(self, x, seq_len=None):
        # x: [batch, num_heads, seq_len, head_dim]
        if seq_len > self.max_seq_len_cached:
            self._build_tables(seq_len)
        cos = self.cos_cached[:, :, :seq_len, ...].to(dtype=x.dtype)
        sin = self.sin_cached[:, :, :seq_len, ...].to(dtype=x.dtype)
        return cos, sin


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate(q, k, cos, sin, position_ids):
    # The tables come with two leading dimensions of size 1
    cos = cos.squeeze(1).squeeze(0)[position_ids].unsqueeze(1)  # [batch, 1, seq_len, head_dim]
    sin = sin.squeeze(1).squeeze(0)[position_ids].unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class DogwoodFeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.w1 = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.w2 = nn.Linear(config.ffn_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.act = ACT2FN[config.activation]

    def forward(self, x):
        n = self.config.weight_slices
        if n > 1:
            # Reproduces the order of additions of a training run that was spread over n devices
            size = self.config.ffn_size // n
            rows1, rows3 = self.w1.weight.split(size, dim=0), self.w3.weight.split(size, dim=0)
            columns = self.w2.weight.split(size, dim=1)
            parts = [F.linear(self.act(F.linear(x, rows1[i])) * F.linear(x, rows3[i]), columns[i]) for i in range(n)]
            return sum(parts)
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class DogwoodAttention(nn.Module):
    """Self-attention with rotary positions and, if the configuration says so, fewer heads for keys and values"""

    def __init__(self, config: DogwoodConfig):
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        if self.head_dim * self.num_heads != self.hidden_size:
            raise ValueError(f"{self.num_heads} heads do not divide a hidden size of {self.hidden_size}")
        kv_size = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(self.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(self.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)
        self._init_rope()

    def _init_rope(self):
        scaling = self.config.rope_scaling
        stretch = 1.0 if scaling is None else scaling["factor"]
        self.rotary_emb = DogwoodRotaryEmbedding(
            self.head_dim, self.config.max_position_embeddings, base=self.config.rope_theta, stretch=stretch
        )

    def _shape(self, tensor: torch.Tensor, heads: int, seq_len: int, bsz: int):
        return tensor.view(bsz, seq_len, heads, self.head_dim).transpose(1, 2).contiguous()

    def _repeat(self, tensor: torch.Tensor):
        groups = self.num_heads // self.num_kv_heads
        if groups == 1:
            return tensor
        bsz, heads, length, head_dim = tensor.shape
        tensor = tensor[:, :, None].expand(bsz, heads, groups, length, head_dim)
        return tensor.reshape(bsz, heads * groups, length, head_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_value: Optional[Tuple[torch.Tensor]] = None,
        output_attentions: bool = False,
        use_cache: bool = False,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[Tuple[torch.Tensor]]]:
        bsz, q_len, _ = hidden_states.size()

        query_states = self._shape(self.q_proj(hidden_states), self.num_heads, q_len, bsz)
        key_states = self._shape(self.k_proj(hidden_states), self.num_kv_heads, q_len, bsz)
        value_states = self._shape(self.v_proj(hidden_states), self.num_kv_heads, q_len, bsz)

        kv_seq_len = key_states.shape[-2]
        if past_key_value is not None:
            kv_seq_len += past_key_value[0].shape[-2]
        cos, sin = self.rotary_emb(value_states, seq_len=kv_seq_len)
        query_states, key_states = rotate(query_states, key_states, cos, sin, position_ids)

        if past_key_value is not None:
            key_states = torch.cat([past_key_value[0], key_states], dim=2)
            value_states = torch.cat([past_key_value[1], value_states], dim=2)
        present = (key_states, value_states) if use_cache else None

        key_states, value_states = self._repeat(key_states), self._repeat(value_states)
        scores = torch.matmul(query_states, key_states.transpose(2, 3)) / math.sqrt(self.head_dim)
        if scores.size() != (bsz, self.num_heads, q_len, kv_seq_len):
            raise ValueError(f"scores of {(bsz, self.num_heads, q_len, kv_seq_len)} expected, {scores.size()} found")
        if attention_mask is not None:
            scores = scores + attention_mask
            scores = torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min, device=scores.device))

        # The softmax is always taken in full precision
        probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(query_states.dtype)
        context = torch.matmul(probs, value_states).transpose(1, 2).contiguous()
        context = context.reshape(bsz, q_len, self.hidden_size)
        return self.o_proj(context), probs if output_attentions else None, present


class DogwoodDecoderLayer(nn.Module):
    def __init__(self, config: DogwoodConfig):
        super().__init__()
        self.attention = DogwoodAttention(config)
        self.feed_forward = DogwoodFeedForward(config)
        self.attention_norm = DogwoodNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn_norm = DogwoodNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_value: Optional[Tuple[torch.Tensor]] = None,
        output_attentions: Optional[bool] = False,
        use_cache: Optional[bool] = False,
    ) -> Tuple[torch.FloatTensor, Optional[Tuple[torch.FloatTensor, torch.FloatTensor]]]:
        """
        Args:
            hidden_states (`torch.FloatTensor`): of shape `(batch, seq_len, hidden_size)`
            past_key_value (`Tuple(torch.FloatTensor)`, *optional*): keys and values of the tokens before
        """
        attn_output, attn_weights, present = self.attention(
            hidden_states=self.attention_norm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
        )
        hidden_states = hidden_states + attn_output
        hidden_states = hidden_states + self.feed_forward(self.ffn_norm(hidden_states))

        outputs = (hidden_states,)
        if output_attentions:
            outputs += (attn_weights,)
        if use_cache:
            outputs += (present,)
        return outputs


@add_start_docstrings("Dogwood without a head.", DOGWOOD_DOCSTRING)
class DogwoodPreTrainedModel(PreTrainedModel):
    config_class = DogwoodConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DogwoodDecoderLayer"]
    _keys_to_ignore_on_load_unexpected = [r"attention\.rotary_emb\.inv_freq"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, DogwoodModel):
            module.gradient_checkpointing = value


@add_start_docstrings("Dogwood without a head.", DOGWOOD_DOCSTRING)
class DogwoodModel(DogwoodPreTrainedModel):
    def __init__(self, config: DogwoodConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DogwoodDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = DogwoodNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def _prepare_decoder_attention_mask(self, attention_mask, input_shape, inputs_embeds, past_key_values_length):
        # both end up as [batch, 1, query, key]
        combined = None
        if input_shape[-1] > 1:
            combined = _causal_bias(input_shape, inputs_embeds.dtype, inputs_embeds.device, past_key_values_length)
        if attention_mask is not None:
            padding = _padding_bias(attention_mask, inputs_embeds.dtype, input_shape[-1]).to(inputs_embeds.device)
            combined = padding if combined is None else padding + combined
        return combined

    @add_start_docstrings_to_model_forward(DOGWOOD_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[List[torch.FloatTensor]] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> Union[Tuple, BaseModelOutputWithPast]:
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = config.use_cache if use_cache is None else use_cache
        return_dict = config.use_return_dict if return_dict is None else return_dict

        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("input_ids and inputs_embeds exclude each other")
        elif input_ids is not None:
            batch_size, seq_length = input_ids.shape
        elif inputs_embeds is not None:
            batch_size, seq_length, _ = inputs_embeds.shape
        else:
            raise ValueError("one of input_ids and inputs_embeds is needed")

        past_length = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if position_ids is None:
            device = input_ids.device if input_ids is not None else inputs_embeds.device
            position_ids = torch.arange(past_length, past_length + seq_length, dtype=torch.long, device=device)
            position_ids = position_ids.unsqueeze(0).view(-1, seq_length)
        else:
            position_ids = position_ids.view(-1, seq_length).long()

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones(
                (batch_size, past_length + seq_length), dtype=torch.bool, device=inputs_embeds.device
            )
        attention_mask = self._prepare_decoder_attention_mask(
            attention_mask, (batch_size, seq_length), inputs_embeds, past_length
        )

        hidden_states = inputs_embeds
        if self.gradient_checkpointing and self.training and use_cache:
            logger.warning_once("Checkpointed gradients and a cache exclude each other: going on without the cache.")
            use_cache = False

        all_hidden_states = () if output_hidden_states else None
        all_attentions = () if output_attentions else None
        next_cache = () if use_cache else None

        for idx, decoder_layer in enumerate(self.layers):
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            past_key_value = past_key_values[idx] if past_key_values is not None else None

            if self.gradient_checkpointing and self.training:

                def create_custom_forward(module):
                    def custom_forward(*inputs):
                        return module(*inputs, output_attentions, None)

                    return custom_forward

                layer_outputs = torch.utils.checkpoint.checkpoint(
                    create_custom_forward(decoder_layer), hidden_states, attention_mask, position_ids, None
                )
            else:
                layer_outputs = decoder_layer(
                    hidden_states,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_value=past_key_value,
                    output_attentions=output_attentions,
                    use_cache=use_cache,
                )

            hidden_states = layer_outputs[0]
            if use_cache:
                next_cache += (layer_outputs[2 if output_attentions else 1],)
            if output_attentions:
                all_attentions += (layer_outputs[1],)

        hidden_states = self.norm(hidden_states)
        if output_hidden_states:
            all_hidden_states += (hidden_states,)

        if not return_dict:
            results = (hidden_states, next_cache, all_hidden_states, all_attentions)
            return tuple(r for r in results if r is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=next_cache,
            hidden_states=all_hidden_states,
            attentions=all_attentions,
        )


class DogwoodForCausalLM(DogwoodPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.model = DogwoodModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def get_decoder(self):
        return self.model

    @add_start_docstrings_to_model_forward(DOGWOOD_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[List[torch.FloatTensor]] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        labels: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> Union[Tuple, CausalLMOutputWithPast]:
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        logits = self.lm_head(outputs[0]).float()

        loss = None
        if labels is not None:
            # A token is predicted by the one before it
            predictions = logits[..., :-1, :].contiguous().view(-1, self.config.vocab_size)
            targets = labels[..., 1:].contiguous().view(-1).to(predictions.device)
            loss = CrossEntropyLoss()(predictions, targets)

        if not return_dict:
            output = (logits,) + outputs[1:]
            return (loss,) + output if loss is not None else output
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        position_ids = kwargs.get("position_ids")
        if attention_mask is not None and position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if past_key_values is not None:
            input_ids = input_ids[:, -1:]
            position_ids = None if position_ids is None else position_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
        }

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(tuple(state.index_select(0, beam_idx) for state in layer) for layer in past_key_values)


@add_start_docstrings("Dogwood with a classifier over its last token.", DOGWOOD_DOCSTRING)
class DogwoodForSequenceClassification(DogwoodPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = DogwoodModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        return_dict: Optional[bool] = None,
    ) -> Union[Tuple, SequenceClassifierOutputWithPast]:
        hidden_states = self.model(input_ids, attention_mask=attention_mask, return_dict=return_dict)[0]
        last = torch.ne(input_ids, self.config.pad_token_id).sum(-1) - 1
        rows = torch.arange(input_ids.shape[0], device=last.device)
        return SequenceClassifierOutputWithPast(logits=self.score(hidden_states)[rows, last])
