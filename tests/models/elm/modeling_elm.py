# coding=utf-8
# Copyright 2021 The Elm authors. Licensed under the Apache License, Version 2.0.
"""PyTorch Elm: a GPT of the first generation, with one transposed projection for query, key and value."""

from typing import Optional, Tuple, Union

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import CrossEntropyLoss
from transformers.activations import ACT2FN
from transformers.file_utils import add_start_docstrings
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D, find_pruneable_heads_and_indices, prune_conv1d_layer
from transformers.utils import logging
from transformers.utils.model_parallel_utils import assert_device_map, get_device_map

from .configuration_elm import ElmConfig

logger = logging.get_logger(__name__)


class ElmPositionEmbedding(nn.Embedding):
    """Learned positions; text never uses the first `offset` rows of the table."""

    def __init__(self, num_embeddings: int, embedding_dim: int, offset: int):
        self.offset = offset
        super().__init__(num_embeddings + offset, embedding_dim)

    def forward(self, position_ids: torch.LongTensor):
        return super().forward(position_ids + self.offset)


class ElmAttention(nn.Module):
    def __init__(self, config, layer_number):
        super().__init__()
        n = config.n_positions
        self.register_buffer("bias", torch.tril(torch.ones(n, n)).bool().view(1, 1, n, n))
        self.register_buffer("masked_bias", torch.tensor(-1e4))
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.head_size = config.n_embd // config.n_head
        if config.n_embd % config.n_head:
            raise ValueError(f"{config.n_head} heads do not divide {config.n_embd} dimensions")
        self.layer_number = layer_number
        self.scale_attn_weights = config.scale_attn_weights
        self.scale_attn_by_inverse_layer_idx = config.scale_attn_by_inverse_layer_idx
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.pruned_heads = set()

    def prune_heads(self, heads):
        if not heads:
            return
        heads, index = find_pruneable_heads_and_indices(heads, self.n_head, self.head_size, self.pruned_heads)
        everywhere = torch.cat([index + part * self.n_embd for part in range(3)])
        self.c_attn = prune_conv1d_layer(self.c_attn, everywhere, dim=1)
        self.c_proj = prune_conv1d_layer(self.c_proj, index, dim=0)
        self.n_head -= len(heads)
        self.pruned_heads |= heads

    def _attend(self, q, k, v, attention_mask=None, head_mask=None):
        w = torch.matmul(q, k.transpose(-1, -2))
        if self.scale_attn_weights:
            w = w / (float(v.size(-1)) ** 0.5)
        # Deeper layers look more gently
        if self.scale_attn_by_inverse_layer_idx:
            w = w / float(self.layer_number + 1)

        queries, keys = w.shape[-2:]
        visible = self.bias[:, :, keys - queries : keys, :keys]
        w = torch.where(visible, w, self.masked_bias.to(w.dtype))
        if attention_mask is not None:
            w = w + attention_mask

        w = nn.Softmax(dim=-1)(w)
        w = self.attn_dropout(w.type(v.dtype))
        if head_mask is not None:
            w = w * head_mask
        return torch.matmul(w, v), w

    def split_heads(self, x):
        shape = x.size()[:-1] + (self.n_head, self.head_size)
        return x.view(*shape).permute(0, 2, 1, 3)  # (batch, head, position, head_size)

    def merge_heads(self, x):
        x = x.permute(0, 2, 1, 3).contiguous()
        shape = x.size()[:-2] + (x.size(-2) * x.size(-1),)
        return x.view(*shape)

    def forward(
        self, x, layer_past=None, attention_mask=None, head_mask=None, use_cache=False, output_attentions=False
    ):
        query, key, value = self.c_attn(x).split(self.n_embd, dim=2)
        query, key, value = self.split_heads(query), self.split_heads(key), self.split_heads(value)
        if layer_past is not None:
            key = torch.cat((layer_past[0], key), dim=-2)
            value = torch.cat((layer_past[1], value), dim=-2)
        present = (key, value) if use_cache is True else None

        a, weights = self._attend(query, key, value, attention_mask, head_mask)
        a = self.resid_dropout(self.c_proj(self.merge_heads(a)))

        outputs = (a, present)
        if output_attentions:
            outputs += (weights,)
        return outputs  # a, present, (attentions)


class ElmMLP(nn.Module):
    def __init__(self, n_inner, config):
        super().__init__()
        self.c_fc = Conv1D(n_inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, n_inner)
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x):
        h = self.act(self.c_fc(x))
        return self.dropout(self.c_proj(h))


class ElmBlock(nn.Module):
    def __init__(self, config, layer_number):
        super().__init__()
        n_inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = ElmAttention(config, layer_number)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = ElmMLP(n_inner, config)

    def forward(
        self, x, layer_past=None, attention_mask=None, head_mask=None, use_cache=False, output_attentions=False
    ):
        output_attn = self.attn(
            self.ln_1(x),
            layer_past=layer_past,
            attention_mask=attention_mask,
            head_mask=head_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        a = output_attn[0]  # a, present, (attentions)
        x = x + a
        m = self.mlp(self.ln_2(x))
        x = x + m
        return (x,) + (output_attn[1:] if use_cache else output_attn[2:])  # x, (present), (attentions)


class ElmPreTrainedModel(PreTrainedModel):
    config_class = ElmConfig
    base_model_prefix = "transformer"
    is_parallelizable = True
    supports_gradient_checkpointing = True

    def __init__(self, *inputs, **kwargs):
        super().__init__(*inputs, **kwargs)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
        if isinstance(module, (nn.Linear, Conv1D)) and module.bias is not None:
            module.bias.data.zero_()


@add_start_docstrings("Elm without a head.")
class ElmModel(ElmPreTrainedModel):
    _keys_to_ignore_on_load_missing = ["attn.masked_bias"]

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = ElmPositionEmbedding(config.n_positions, config.n_embd, config.position_offset)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([ElmBlock(config, layer_number=i) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

        # Model parallel
        self.model_parallel = False
        self.device_map = None
        self.gradient_checkpointing = False
        self.post_init()

    def parallelize(self, device_map=None):
        if device_map is None:
            device_map = get_device_map(len(self.h), range(torch.cuda.device_count()))
        assert_device_map(device_map, len(self.h))
        self.device_map, self.model_parallel = device_map, True
        self.first_device = f"cuda:{min(device_map)}"
        self.last_device = f"cuda:{max(device_map)}"
        self.wte, self.wpe = self.wte.to(self.first_device), self.wpe.to(self.first_device)
        for device, blocks in device_map.items():
            for i in blocks:
                self.h[i] = self.h[i].to(f"cuda:{device}")
        self.ln_f = self.ln_f.to(self.last_device)

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, new_embeddings):
        self.wte = new_embeddings

    def _prune_heads(self, heads_to_prune):
        for layer, heads in heads_to_prune.items():
            self.h[layer].attn.prune_heads(heads)

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Tuple[Tuple[torch.Tensor]]] = None,
        attention_mask: Optional[torch.FloatTensor] = None,
        token_type_ids: Optional[torch.LongTensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        head_mask: Optional[torch.FloatTensor] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> Union[Tuple, BaseModelOutputWithPastAndCrossAttentions]:
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache is None:
            use_cache = self.config.use_cache
        if return_dict is None:
            return_dict = self.config.use_return_dict

        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("input_ids and inputs_embeds exclude each other")
        if input_ids is not None:
            input_shape = input_ids.size()
            input_ids = input_ids.view(-1, input_shape[-1])
        else:
            input_shape = inputs_embeds.size()[:-1]
        device = input_ids.device if input_ids is not None else inputs_embeds.device

        if past_key_values is None:
            past_length = 0
            past_key_values = tuple([None] * len(self.h))
        else:
            past_length = past_key_values[0][0].size(-2)

        if token_type_ids is not None:
            token_type_ids = token_type_ids.view(-1, input_shape[-1])
        if position_ids is None:
            position_ids = torch.arange(past_length, input_shape[-1] + past_length, dtype=torch.long, device=device)
            position_ids = position_ids.unsqueeze(0)
        position_ids = position_ids.view(-1, input_shape[-1])

        if attention_mask is not None:
            attention_mask = attention_mask.view(-1, past_length + input_shape[-1])[:, None, None, :]
            attention_mask = (1.0 - attention_mask.to(dtype=self.dtype)) * torch.finfo(self.dtype).min
        # one for each layer: batch x n_head x positions x positions
        head_mask = self.get_head_mask(head_mask, self.config.n_layer)

        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        hidden_states = inputs_embeds + self.wpe(position_ids)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        hidden_states = self.drop(hidden_states)
        output_shape = input_shape + (hidden_states.size(-1),)

        presents = () if use_cache else None
        attentions = () if output_attentions else None
        states = () if output_hidden_states else None
        for i, (block, layer_past) in enumerate(zip(self.h, past_key_values)):
            if self.model_parallel:
                torch.cuda.set_device(hidden_states.device)
                if attention_mask is not None:
                    attention_mask = attention_mask.to(hidden_states.device)
            if output_hidden_states:
                states = states + (hidden_states,)

            if self.gradient_checkpointing and self.training:

                def create_custom_forward(module):
                    def custom_forward(*inputs):
                        # neither a cache nor attentions while checkpointing
                        return module(*inputs, False, False)

                    return custom_forward

                outputs = torch.utils.checkpoint.checkpoint(
                    create_custom_forward(block), hidden_states, None, attention_mask, head_mask[i]
                )
            else:
                outputs = block(
                    hidden_states,
                    layer_past=layer_past,
                    attention_mask=attention_mask,
                    head_mask=head_mask[i],
                    use_cache=use_cache,
                    output_attentions=output_attentions,
                )
            hidden_states = outputs[0]
            if use_cache is True:
                presents = presents + (outputs[1],)
            if output_attentions:
                attentions = attentions + (outputs[-1],)
            if self.model_parallel:
                for device_index, blocks in self.device_map.items():
                    if i == blocks[-1] and f"cuda:{device_index}" != self.last_device:
                        hidden_states = hidden_states.to(f"cuda:{device_index + 1}")

        hidden_states = self.ln_f(hidden_states).view(*output_shape)
        if output_hidden_states:
            states = states + (hidden_states,)

        if not return_dict:
            return tuple(v for v in (hidden_states, presents, states, attentions) if v is not None)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states, past_key_values=presents, hidden_states=states, attentions=attentions
        )


@add_start_docstrings("Elm with a head that predicts the next token, tied to its embeddings.")
class ElmLMHeadModel(ElmPreTrainedModel):
    _keys_to_ignore_on_load_missing = [r"attn\.masked_bias", r"attn\.bias", r"lm_head\.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.transformer = ElmModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.model_parallel = False
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        if past_key_values:
            input_ids = input_ids[:, -1].unsqueeze(-1)
        kept = {name: kwargs.get(name) for name in ("attention_mask", "use_cache")}
        return {"input_ids": input_ids, "past_key_values": past_key_values, **kept}

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Tuple[Tuple[torch.Tensor]]] = None,
        attention_mask: Optional[torch.FloatTensor] = None,
        token_type_ids: Optional[torch.LongTensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        head_mask: Optional[torch.FloatTensor] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        labels: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> Union[Tuple, CausalLMOutputWithCrossAttentions]:
        if return_dict is None:
            return_dict = self.config.use_return_dict
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        hidden_states = outputs[0]
        if self.model_parallel:
            torch.cuda.set_device(self.transformer.first_device)
            hidden_states = hidden_states.to(self.lm_head.weight.device)
        lm_logits = self.lm_head(hidden_states)

        loss = None
        if labels is not None:
            ahead = lm_logits[..., :-1, :].contiguous()
            loss = CrossEntropyLoss()(ahead.view(-1, ahead.size(-1)), labels[..., 1:].contiguous().view(-1))

        if not return_dict:
            output = (lm_logits,) + outputs[1:]
            return output if loss is None else (loss,) + output
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=lm_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
