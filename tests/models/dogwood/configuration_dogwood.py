# Copyright 2023 The Dogwood authors. Licensed under the Apache License, Version 2.0.
"""Dogwood configuration."""

from transformers.configuration_utils import PretrainedConfig


class DogwoodConfig(PretrainedConfig):
    model_type = "dogwood"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=320,
        hidden_size=64,
        ffn_size=144,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=None,
        activation="silu",
        max_position_embeddings=128,
        initializer_range=0.02,
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        qkv_bias=True,
        weight_slices=1,
        use_cache=True,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.ffn_size = ffn_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        # Configurations of the first release knew of one kind of heads only
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.activation = activation
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.norm_eps = norm_eps
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.qkv_bias = qkv_bias
        self.weight_slices = weight_slices
        self.use_cache = use_cache
        if rope_scaling is not None and rope_scaling.get("type") != "linear":
            raise ValueError(f"Dogwood only stretches its positions linearly, not by {rope_scaling}")
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
