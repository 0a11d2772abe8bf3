# Copyright 2026 The Maple authors. Licensed under the Apache License, Version 2.0.
"""Maple configuration."""

from transformers.configuration_utils import PreTrainedConfig


class MapleConfig(PreTrainedConfig):
    model_type = "maple"

    vocab_size: int = 128
    hidden_size: int = 32
    intermediate_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    hidden_act: str = "gelu"
    max_position_embeddings: int = 64
    layer_norm_eps: float = 1e-5
