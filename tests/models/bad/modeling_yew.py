# Copyright 2026 The Yew authors. Licensed under the Apache License, Version 2.0.
"""Yew: an encoder, which sees the tokens on both sides and predicts those that were masked."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import PreTrainedModel

from .configuration_yew import YewConfig


class YewSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None):
        batch_size, length, _ = hidden_states.shape
        shape = (batch_size, length, self.num_heads, self.head_dim)
        query = self.query(hidden_states).view(shape).transpose(1, 2)
        key = self.key(hidden_states).view(shape).transpose(1, 2)
        value = self.value(hidden_states).view(shape).transpose(1, 2)
        scores = torch.matmul(query, key.transpose(-1, -2)) * self.head_dim**-0.5
        if attention_mask is not None:
            scores = scores + attention_mask
        context = torch.matmul(scores.softmax(dim=-1), value)
        return self.dense(context.transpose(1, 2).reshape(batch_size, length, -1))


class YewLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = YewSelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states, attention_mask=None):
        hidden_states = self.attention_norm(hidden_states + self.attention(hidden_states, attention_mask))
        return self.output_norm(hidden_states + self.output(self.act_fn(self.intermediate(hidden_states))))


class YewPreTrainedModel(PreTrainedModel):
    config_class = YewConfig
    base_model_prefix = "yew"


class YewModel(YewPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layer = nn.ModuleList([YewLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden_states = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        attention_mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask)
        return BaseModelOutput(last_hidden_state=hidden_states)


class YewForMaskedLM(YewPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.yew = YewModel(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.decoder(self.yew(input_ids, attention_mask).last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
        return MaskedLMOutput(loss=loss, logits=logits)


__all__ = ["YewForMaskedLM", "YewModel"]
