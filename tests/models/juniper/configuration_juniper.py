# Copyright 2024 The Juniper authors. Licensed under the Apache License, Version 2.0.
"""Juniper configuration: some fields are only in a checkpoint's config.json."""

from transformers.configuration_utils import PretrainedConfig


class JuniperConfig(PretrainedConfig):
    model_type = "juniper"

    def __init__(
        self,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=192,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        attn_implementation="eager",
        use_cache=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.attn_implementation = attn_implementation
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self.rope_scaling = rope_scaling  # transformers 5 puts a dict here
