# coding=utf-8
# Copyright 2022 The Fir authors. Licensed under the Apache License, Version 2.0.
"""PyTorch Fir: linear biases in place of positions, query, key and value interleaved head by head."""

import math
import warnings
from typing import Optional, Tuple, Union

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import CrossEntropyLoss, LayerNorm
from torch.nn import functional as F
from transformers.file_utils import add_start_docstrings
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_fir import FirConfig

logger = logging.get_logger(__name__)


def _future_mask(shape, device: torch.device, past_length: int) -> torch.BoolTensor:
    """True where a key comes after a query: [batch, 1, query, key]"""
    batch_size, length = shape
    mask = torch.zeros(length, past_length + length, dtype=torch.bool, device=device)
    mask[:, past_length:] = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    return mask[None, None].expand(batch_size, 1, length, past_length + length)


def _padding_mask(mask: torch.Tensor, length: int) -> torch.BoolTensor:
    batch_size, total = mask.shape
    return mask.eq(0)[:, None, None, :].expand(batch_size, 1, length, total)


def _slopes(num_heads: int):
    """A geometric series for a power of two; other counts take every other one of the next series"""
    power = 2 ** math.floor(math.log2(num_heads))
    ratio = 2.0 ** (-8.0 / power)
    slopes = [ratio**i for i in range(1, power + 1)]
    if power < num_heads:
        finer = 2.0 ** (-4.0 / power)
        slopes += [finer**i for i in range(1, 2 * (num_heads - power) + 1, 2)]
    return slopes


def build_alibi(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """
    What is added to the scores before the softmax, [batch_size * num_heads, 1, length]. A softmax does not see a
    constant, so the slope is multiplied by the position of the key, not by its distance from the query.
    """
    batch_size, length = attention_mask.shape
    slopes = torch.tensor(_slopes(num_heads), dtype=torch.float32, device=attention_mask.device)
    # Padding does not count
    positions = (attention_mask.cumsum(dim=-1) - 1) * attention_mask
    alibi = slopes[:, None] * positions[:, None, :]
    return alibi.reshape(batch_size * num_heads, 1, length).to(dtype)


def dropout_add(x: torch.Tensor, residual: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Adds the residual where the dropout is"""
    return residual + F.dropout(x, p=p, training=training)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """A GELU whose constant is written out, sqrt(2 / pi) rounded to eight digits"""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


class TanhGeluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return tanh_gelu(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
        return grad * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (0.79788456 + 0.1070322243 * x * x))


class FirGelu(nn.Module):
    """The function when running, its hand-written gradient when training"""

    def __init__(self):
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return TanhGeluFunction.apply(x)
        else:
            return tanh_gelu(x)


class FirAttention(nn.Module):
    def __init__(self, config: FirConfig):
        super().__init__()
        self.num_heads = config.n_head
        self.hidden_size = config.hidden_size
        self.head_dim = config.hidden_size // config.n_head
        if self.head_dim * self.num_heads != self.hidden_size:
            raise ValueError(f"{self.num_heads} heads do not divide a hidden size of {self.hidden_size}")
        self.hidden_dropout = config.hidden_dropout
        self.inv_norm_factor = 1.0 / math.sqrt(self.head_dim)
        self.beta = 1.0
        self.query_key_value = nn.Linear(self.hidden_size, 3 * self.hidden_size, bias=True)
        self.dense = nn.Linear(self.hidden_size, self.hidden_size)
        self.attention_dropout = nn.Dropout(config.attention_dropout)

    def _split_heads(self, fused: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[batch, length, heads * 3 * head_dim] to three of [batch, length, heads, head_dim]"""
        batch_size, length, _ = fused.shape
        fused = fused.view(batch_size, length, self.num_heads, 3, self.head_dim)
        return fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]

    def _merge_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[batch * heads, length, head_dim] to [batch, length, heads * head_dim]"""
        rows, length, _ = x.shape
        x = x.view(rows // self.num_heads, self.num_heads, length, self.head_dim).permute(0, 2, 1, 3)
        return x.reshape(rows // self.num_heads, length, self.num_heads * self.head_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        alibi: torch.Tensor,
        attention_mask: torch.Tensor,
        layer_past: Optional[Tuple[torch.Tensor, torch.Tensor]] = None,
        head_mask: Optional[torch.Tensor] = None,
        use_cache: bool = False,
        output_attentions: bool = False,
    ):
        (query, key, value) = self._split_heads(self.query_key_value(hidden_states))
        batch_size, q_length, _, _ = query.shape

        # The heads join the batch; the key is laid out for the product
        query = query.transpose(1, 2).reshape(batch_size * self.num_heads, q_length, self.head_dim)
        key = key.permute(0, 2, 3, 1).reshape(batch_size * self.num_heads, self.head_dim, q_length)
        value = value.transpose(1, 2).reshape(batch_size * self.num_heads, q_length, self.head_dim)
        if layer_past is not None:
            key = torch.cat((layer_past[0], key), dim=2)
            value = torch.cat((layer_past[1], value), dim=1)
        kv_length = key.shape[-1]
        present = (key, value) if use_cache is True else None

        # beta * alibi + alpha * query @ key, for all heads at once
        scores = alibi.baddbmm(batch1=query, batch2=key, beta=self.beta, alpha=self.inv_norm_factor)
        scores = scores.view(batch_size, self.num_heads, q_length, kv_length)

        dtype = scores.dtype
        # bfloat16 has the range to be masked as it is, float16 has not
        if dtype == torch.float16:
            scores = scores.to(torch.float)
        scores = torch.masked_fill(scores, attention_mask, torch.finfo(scores.dtype).min)
        probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)
        probs = self.attention_dropout(probs)
        if head_mask is not None:
            probs = probs * head_mask

        context = torch.bmm(probs.view(batch_size * self.num_heads, q_length, kv_length), value)
        output = self.dense(self._merge_heads(context))
        output = dropout_add(output, residual, self.hidden_dropout, self.training)

        outputs = (output, present)
        if output_attentions:
            outputs += (probs,)
        return outputs


class FirMLP(nn.Module):
    def __init__(self, config: FirConfig):
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.gelu_impl = FirGelu()
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        inner = self.gelu_impl(self.dense_h_to_4h(hidden_states))
        return dropout_add(self.dense_4h_to_h(inner), residual, self.hidden_dropout, self.training)


class FirBlock(nn.Module):
    def __init__(self, config: FirConfig):
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attention = FirAttention(config)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = FirMLP(config)
        self.residual_after_norm = config.apply_residual_connection_post_layernorm

    def forward(
        self,
        hidden_states: torch.Tensor,
        alibi: torch.Tensor,
        attention_mask: torch.Tensor,
        layer_past: Optional[Tuple[torch.Tensor, torch.Tensor]] = None,
        head_mask: Optional[torch.Tensor] = None,
        use_cache: bool = False,
        output_attentions: bool = False,
    ):
        normed = self.input_layernorm(hidden_states)
        # The residual comes from before the norm, or from after it
        if self.residual_after_norm:
            residual = normed
        else:
            residual = hidden_states

        attn_outputs = self.self_attention(
            normed,
            residual,
            alibi,
            attention_mask,
            layer_past=layer_past,
            head_mask=head_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        hidden_states, rest = attn_outputs[0], attn_outputs[1:]

        normed = self.post_attention_layernorm(hidden_states)
        residual = normed if self.residual_after_norm else hidden_states
        hidden_states = self.mlp(normed, residual)

        if not use_cache:
            rest = rest[1:]
        return (hidden_states,) + rest  # hidden_states, (present), (attentions)


class FirPreTrainedModel(PreTrainedModel):
    config_class = FirConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FirBlock"]

    def _init_weights(self, module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)

    def _set_gradient_checkpointing(self, module: nn.Module, value: bool = False):
        if isinstance(module, FirModel):
            module.gradient_checkpointing = value


@add_start_docstrings("Fir without a head.")
class FirModel(FirPreTrainedModel):
    def __init__(self, config: FirConfig):
        super().__init__(config)
        self.num_heads = config.n_head
        # The embeddings have a norm of their own
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.word_embeddings_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.h = nn.ModuleList([FirBlock(config) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def set_input_embeddings(self, new_embeddings: torch.Tensor):
        self.word_embeddings = new_embeddings

    def _prepare_attn_mask(self, attention_mask, input_shape: Tuple[int, int], past_length: int) -> torch.BoolTensor:
        _, length = input_shape
        mask = _padding_mask(attention_mask, length)
        if length > 1:
            mask = mask | _future_mask(input_shape, attention_mask.device, past_length)
        return mask

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Tuple[Tuple[torch.Tensor, torch.Tensor], ...]] = None,
        attention_mask: Optional[torch.Tensor] = None,
        head_mask: Optional[torch.LongTensor] = None,
        inputs_embeds: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        **deprecated_arguments,
    ) -> Union[Tuple[torch.Tensor, ...], BaseModelOutputWithPastAndCrossAttentions]:
        if deprecated_arguments.pop("position_ids", None) is not None:
            warnings.warn("Fir has no positions; `position_ids` is ignored", FutureWarning)
        if deprecated_arguments:
            raise ValueError(f"unknown arguments: {sorted(deprecated_arguments)}")

        output_attentions = output_attentions if output_attentions is not None else self.config.output_attentions
        output_hidden_states = (
            output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        )
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict

        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        batch_size, length, _ = inputs_embeds.shape

        past_length = 0
        if past_key_values is None:
            past_key_values = (None,) * len(self.h)
        else:
            past_length = past_key_values[0][0].shape[2]
        head_mask = self.get_head_mask(head_mask, self.config.n_layer)

        hidden_states = self.word_embeddings_layernorm(inputs_embeds)

        if attention_mask is None:
            attention_mask = torch.ones((batch_size, past_length + length), device=hidden_states.device)
        else:
            attention_mask = attention_mask.to(hidden_states.device)
        alibi = build_alibi(attention_mask, self.num_heads, dtype=hidden_states.dtype)
        causal_mask = self._prepare_attn_mask(attention_mask, (batch_size, length), past_length)

        presents = () if use_cache else None
        all_attentions = () if output_attentions else None
        all_hidden_states = () if output_hidden_states else None
        for block, layer_past, layer_head_mask in zip(self.h, past_key_values, head_mask):
            if output_hidden_states:
                all_hidden_states += (hidden_states,)

            if self.gradient_checkpointing and self.training:

                def run(*inputs, block=block):
                    return block(*inputs, use_cache=use_cache, output_attentions=output_attentions)

                outputs = torch.utils.checkpoint.checkpoint(
                    run, hidden_states, alibi, causal_mask, layer_past, layer_head_mask
                )
            else:
                outputs = block(
                    hidden_states,
                    alibi=alibi,
                    attention_mask=causal_mask,
                    layer_past=layer_past,
                    head_mask=layer_head_mask,
                    use_cache=use_cache,
                    output_attentions=output_attentions,
                )

            hidden_states = outputs[0]
            if use_cache:
                presents += (outputs[1],)
            if output_attentions:
                all_attentions += (outputs[-1],)

        hidden_states = self.ln_f(hidden_states)
        if output_hidden_states:
            all_hidden_states += (hidden_states,)

        if not return_dict:
            return tuple(v for v in [hidden_states, presents, all_hidden_states, all_attentions] if v is not None)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            past_key_values=presents,
            hidden_states=all_hidden_states,
            attentions=all_attentions,
        )


@add_start_docstrings("Fir with a head that predicts the next token, tied to its embeddings.")
class FirForCausalLM(FirPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config: FirConfig):
        super().__init__(config)
        self.transformer = FirModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: torch.Tensor):
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Tuple[Tuple[torch.Tensor, torch.Tensor], ...]] = None,
        attention_mask: Optional[torch.Tensor] = None,
        head_mask: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        **deprecated_arguments,
    ) -> Union[Tuple[torch.Tensor], CausalLMOutputWithCrossAttentions]:
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        transformer_outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **deprecated_arguments,
        )
        lm_logits = self.lm_head(transformer_outputs[0])

        loss = None
        if labels is not None:
            shift_logits = lm_logits[:, :-1].contiguous().flatten(0, 1)
            loss = CrossEntropyLoss()(shift_logits, labels[:, 1:].contiguous().flatten().to(lm_logits.device))

        if not return_dict:
            output = (lm_logits,) + transformer_outputs[1:]
            return ((loss,) + output) if loss is not None else output
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=lm_logits,
            past_key_values=transformer_outputs.past_key_values,
            hidden_states=transformer_outputs.hidden_states,
            attentions=transformer_outputs.attentions,
        )
