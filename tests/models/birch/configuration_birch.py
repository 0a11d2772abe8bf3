# Copyright 2026 The Birch authors. Licensed under the Apache License, Version 2.0.
"""Birch configuration."""

from transformers.configuration_utils import PreTrainedConfig


class BirchConfig(PreTrainedConfig):
    model_type = "birch"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 288
    hidden_size: int = 48
    ffn_hidden_size: int = 112
    num_hidden_layers: int = 3
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 16
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 256
    initializer_range: float = 0.02
    norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    attn_softcap: float | None = 20.0
    final_softcap: float | None = 12.0

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5}
        super().__post_init__(**kwargs)


__all__ = ["BirchConfig"]
