# coding=utf-8
# Copyright 2022 The Hazel authors. Licensed under the Apache License, Version 2.0.
"""PyTorch Hazel: a decoder whose embeddings are narrower than its layers."""

import random
from typing import List, Optional, Tuple, Union

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import CrossEntropyLoss
from transformers.activations import ACT2FN
from transformers.file_utils import add_start_docstrings, replace_return_docstrings
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_hazel import HazelConfig

logger = logging.get_logger(__name__)


def _upper_triangle(shape, dtype: torch.dtype, device: torch.device, past_length: int = 0):
    """The most negative number above the diagonal, for attention that looks back only."""
    batch, length = shape
    mask = torch.full((length, past_length + length), torch.finfo(dtype).min, dtype=dtype, device=device)
    mask = mask.triu(past_length + 1)
    return mask[None, None, :, :].expand(batch, 1, length, past_length + length)


def _blank_out(mask: torch.Tensor, dtype: torch.dtype, length: int):
    kept = mask.to(dtype)[:, None, None, :].expand(mask.size(0), 1, length, mask.size(1))
    return (1.0 - kept) * torch.finfo(dtype).min


class HazelLearnedPositions(nn.Embedding):
    """A vector for every position, counted over the tokens that are no padding."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        # Two rows were once kept for padding, and every checkpoint still has them
        self.offset = 2
        super().__init__(num_embeddings + self.offset, embedding_dim)

    def forward(self, attention_mask: torch.LongTensor, past_key_values_length: int = 0):
        """`attention_mask` covers the past as well: [batch, past + length]"""
        attention_mask = attention_mask.long()
        counted = torch.cumsum(attention_mask, dim=1) * attention_mask - 1
        # Only the tokens that are new
        counted = counted[:, past_key_values_length:]
        return super().forward(counted + self.offset)


class HazelAttention(nn.Module):
    """Attention of a decoder, which could also attend to an encoder, though no Hazel ever had one"""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, is_decoder: bool = False, bias: bool = True):
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.head_dim = embed_dim // num_heads
        if (self.head_dim * num_heads) != self.embed_dim:
            raise ValueError(f"{num_heads} heads do not divide {embed_dim} dimensions")
        self.scaling = self.head_dim**-0.5
        self.is_decoder = is_decoder
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def _shape(self, tensor: torch.Tensor, seq_len: int, bsz: int):
        return tensor.view(bsz, seq_len, self.num_heads, self.head_dim).transpose(1, 2).contiguous()

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: Optional[torch.Tensor] = None,
        past_key_value: Optional[Tuple[torch.Tensor]] = None,
        attention_mask: Optional[torch.Tensor] = None,
        layer_head_mask: Optional[torch.Tensor] = None,
        output_attentions: bool = False,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[Tuple[torch.Tensor]]]:
        """hidden_states: [batch, time, channel]"""
        is_cross_attention = key_value_states is not None
        bsz, tgt_len, _ = hidden_states.size()

        # The query is scaled, not the product
        query = self.q_proj(hidden_states) * self.scaling
        if is_cross_attention and past_key_value is not None:
            key, value = past_key_value
        elif is_cross_attention:
            key = self._shape(self.k_proj(key_value_states), -1, bsz)
            value = self._shape(self.v_proj(key_value_states), -1, bsz)
        else:
            key = self._shape(self.k_proj(hidden_states), -1, bsz)
            value = self._shape(self.v_proj(hidden_states), -1, bsz)
            if past_key_value is not None:
                key = torch.cat([past_key_value[0], key], dim=2)
                value = torch.cat([past_key_value[1], value], dim=2)
        if self.is_decoder:
            past_key_value = (key, value)

        # One matrix for each head of each sequence
        folded = (bsz * self.num_heads, -1, self.head_dim)
        query = self._shape(query, tgt_len, bsz).view(*folded)
        key = key.view(*folded)
        value = value.view(*folded)
        src_len = key.size(1)

        weights = torch.bmm(query, key.transpose(1, 2))
        if attention_mask is not None:
            if attention_mask.size() != (bsz, 1, tgt_len, src_len):
                raise ValueError(f"a mask of {(bsz, 1, tgt_len, src_len)} is needed, not of {attention_mask.size()}")
            weights = weights.view(bsz, self.num_heads, tgt_len, src_len) + attention_mask
            lowest = torch.tensor(torch.finfo(weights.dtype).min, device=weights.device)
            weights = torch.max(weights, lowest).view(bsz * self.num_heads, tgt_len, src_len)

        if weights.dtype == torch.float16:
            weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(torch.float16)
        else:
            weights = nn.functional.softmax(weights, dim=-1)

        if layer_head_mask is not None:
            weights = weights.view(bsz, self.num_heads, tgt_len, src_len) * layer_head_mask.view(1, -1, 1, 1)
            weights = weights.view(bsz * self.num_heads, tgt_len, src_len)
        returned = weights.view(bsz, self.num_heads, tgt_len, src_len) if output_attentions else None

        probs = nn.functional.dropout(weights, p=self.dropout, training=self.training)
        context = torch.bmm(probs, value).view(bsz, self.num_heads, tgt_len, self.head_dim)
        # embed_dim is asked of the module, since the last axis may be split over devices
        context = context.transpose(1, 2).reshape(bsz, tgt_len, self.embed_dim)
        return self.out_proj(context), returned, past_key_value


class HazelDecoderLayer(nn.Module):
    def __init__(self, config: HazelConfig):
        super().__init__()
        self.self_attn = HazelAttention(
            embed_dim=config.hidden_size,
            num_heads=config.num_attention_heads,
            dropout=config.attention_dropout,
            is_decoder=True,
            bias=config.enable_bias,
        )
        affine = config.layer_norm_elementwise_affine
        self.do_layer_norm_before = config.do_layer_norm_before
        self.dropout = config.dropout
        self.activation_fn = ACT2FN[config.activation_function]
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, elementwise_affine=affine)
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_dim, bias=config.enable_bias)
        self.fc2 = nn.Linear(config.ffn_dim, config.hidden_size, bias=config.enable_bias)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, elementwise_affine=affine)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        layer_head_mask: Optional[torch.Tensor] = None,
        past_key_value: Optional[Tuple[torch.Tensor]] = None,
        output_attentions: Optional[bool] = False,
        use_cache: Optional[bool] = False,
    ) -> Tuple[torch.FloatTensor, Optional[Tuple[torch.FloatTensor, torch.FloatTensor]]]:
        residual = hidden_states
        # All sizes but one have their norms in front
        if self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, attn_weights, present = self.self_attn(
            hidden_states=hidden_states,
            past_key_value=past_key_value,
            attention_mask=attention_mask,
            layer_head_mask=layer_head_mask,
            output_attentions=output_attentions,
        )
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = residual + hidden_states
        if not self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)

        # The feed-forward part sees a list of tokens
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, hidden_states.size(-1))
        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.fc2(self.activation_fn(self.fc1(hidden_states)))
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = (residual + hidden_states).view(shape)
        if not self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)

        outputs = (hidden_states,)
        if output_attentions:
            outputs += (attn_weights,)
        if use_cache:
            outputs += (present,)
        return outputs


@add_start_docstrings("Hazel without a head.")
class HazelPreTrainedModel(PreTrainedModel):
    config_class = HazelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HazelDecoderLayer"]
    _keys_to_ignore_on_load_unexpected = [r"decoder\.version"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=self.config.init_std)


class HazelDecoder(HazelPreTrainedModel):
    def __init__(self, config: HazelConfig):
        super().__init__(config)
        self.layerdrop = config.layerdrop
        self.embed_tokens = nn.Embedding(config.vocab_size, config.word_embed_proj_dim, config.pad_token_id)
        self.embed_positions = HazelLearnedPositions(config.max_position_embeddings, config.hidden_size)

        if config.word_embed_proj_dim != config.hidden_size:
            self.project_in = nn.Linear(config.word_embed_proj_dim, config.hidden_size, bias=False)
            self.project_out = nn.Linear(config.hidden_size, config.word_embed_proj_dim, bias=False)
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

        self.layers = nn.ModuleList([HazelDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def _prepare_decoder_attention_mask(self, attention_mask, input_shape, inputs_embeds, past_key_values_length):
        mask = _blank_out(attention_mask, inputs_embeds.dtype, input_shape[-1]).to(inputs_embeds.device)
        if input_shape[-1] > 1:
            mask = mask + _upper_triangle(
                input_shape, inputs_embeds.dtype, inputs_embeds.device, past_length=past_key_values_length
            )
        return mask

    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        head_mask: Optional[torch.Tensor] = None,
        past_key_values: Optional[List[torch.FloatTensor]] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> Union[Tuple, BaseModelOutputWithPast]:
        output_attentions = output_attentions if output_attentions is not None else self.config.output_attentions
        output_hidden_states = (
            output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        )
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict

        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("input_ids and inputs_embeds exclude each other")
        elif input_ids is not None:
            input_shape = input_ids.size()
            input_ids = input_ids.view(-1, input_shape[-1])
            inputs_embeds = self.embed_tokens(input_ids)
        elif inputs_embeds is not None:
            input_shape = inputs_embeds.size()[:-1]
        else:
            raise ValueError("one of input_ids and inputs_embeds is needed")

        batch_size, seq_length = input_shape
        past_length = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, past_length + seq_length, device=inputs_embeds.device)
        elif attention_mask.shape[1] != past_length + seq_length:
            raise ValueError(f"the mask covers {attention_mask.shape[1]} tokens of {past_length + seq_length}")
        causal_mask = self._prepare_decoder_attention_mask(attention_mask, input_shape, inputs_embeds, past_length)
        pos_embeds = self.embed_positions(attention_mask, past_length)

        if self.project_in is not None:
            inputs_embeds = self.project_in(inputs_embeds)
        hidden_states = inputs_embeds + pos_embeds

        if self.gradient_checkpointing and self.training and use_cache:
            logger.warning_once("Checkpointed gradients and a cache exclude each other: going on without the cache.")
            use_cache = False

        all_hidden_states = () if output_hidden_states else None
        all_attentions = () if output_attentions else None
        next_cache = () if use_cache else None

        if head_mask is not None and head_mask.size(0) != len(self.layers):
            raise ValueError(f"head_mask is for {head_mask.size(0)} layers, the model has {len(self.layers)}")

        for idx, decoder_layer in enumerate(self.layers):
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            # LayerDrop
            if self.training and random.uniform(0, 1) < self.layerdrop:
                continue

            layer_head_mask = head_mask[idx] if head_mask is not None else None
            past_key_value = past_key_values[idx] if past_key_values is not None else None

            if self.gradient_checkpointing and self.training:

                def create_custom_forward(module):
                    def custom_forward(*inputs):
                        return module(*inputs, output_attentions, None)

                    return custom_forward

                layer_outputs = torch.utils.checkpoint.checkpoint(
                    create_custom_forward(decoder_layer), hidden_states, causal_mask, layer_head_mask, None
                )
            else:
                layer_outputs = decoder_layer(
                    hidden_states,
                    attention_mask=causal_mask,
                    layer_head_mask=layer_head_mask,
                    past_key_value=past_key_value,
                    output_attentions=output_attentions,
                    use_cache=use_cache,
                )

            hidden_states = layer_outputs[0]
            if use_cache:
                next_cache += (layer_outputs[-1],)
            if output_attentions:
                all_attentions += (layer_outputs[1],)

        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        if self.project_out is not None:
            hidden_states = self.project_out(hidden_states)
        if output_hidden_states:
            all_hidden_states += (hidden_states,)

        if not return_dict:
            return tuple(v for v in (hidden_states, next_cache, all_hidden_states, all_attentions) if v is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=next_cache,
            hidden_states=all_hidden_states,
            attentions=all_attentions,
        )


@add_start_docstrings("Hazel without a head.")
class HazelModel(HazelPreTrainedModel):
    def __init__(self, config: HazelConfig):
        super().__init__(config)
        self.decoder = HazelDecoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.decoder.embed_tokens

    def get_decoder(self):
        return self.decoder

    def forward(self, input_ids: torch.LongTensor = None, attention_mask: Optional[torch.Tensor] = None, **kwargs):
        return self.decoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class HazelForCausalLM(HazelPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.model = HazelModel(config)
        # shares its weight with the embeddings
        self.lm_head = nn.Linear(config.word_embed_proj_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.decoder.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    @replace_return_docstrings(output_type=CausalLMOutputWithPast, config_class="HazelConfig")
    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        head_mask: Optional[torch.Tensor] = None,
        past_key_values: Optional[List[torch.FloatTensor]] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        labels: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> Union[Tuple, CausalLMOutputWithPast]:
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        # The decoder inside the model is asked directly
        outputs = self.model.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            head_mask=head_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        logits = self.lm_head(outputs[0]).contiguous()

        loss = None
        if labels is not None:
            predictions = logits[..., :-1, :].contiguous()
            targets = labels.to(logits.device)[..., 1:].contiguous()
            loss = CrossEntropyLoss()(predictions.view(-1, self.config.vocab_size), targets.view(-1))

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
