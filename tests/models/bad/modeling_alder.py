# Copyright 2026 The Alder authors. Licensed under the Apache License, Version 2.0.
"""Alder: layers that a model could be built of, and no causal language model among them."""

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .configuration_alder import AlderConfig


class AlderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states):
        return hidden_states + self.down(nn.functional.gelu(self.up(self.norm(hidden_states))))


class AlderPreTrainedModel(PreTrainedModel):
    config_class = AlderConfig
    base_model_prefix = "model"


class AlderModel(AlderPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([AlderLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def forward(self, inputs_embeds):
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states
