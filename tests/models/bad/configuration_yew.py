# Copyright 2026 The Yew authors. Licensed under the Apache License, Version 2.0.
"""Yew configuration."""

from transformers.configuration_utils import PreTrainedConfig


class YewConfig(PreTrainedConfig):
    model_type = "yew"

    vocab_size: int = 128
    hidden_size: int = 32
    intermediate_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    hidden_act: str = "gelu"
    max_position_embeddings: int = 64
    layer_norm_eps: float = 1e-5
