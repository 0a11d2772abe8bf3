# Copyright 2026 The Laurel authors. Licensed under the Apache License, Version 2.0.
"""Laurel configuration."""

from transformers.configuration_utils import PreTrainedConfig


class LaurelConfig(PreTrainedConfig):
    model_type = "laurel"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 320
    hidden_size: int = 64
    intermediate_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    hidden_act: str = "silu"
    max_position_embeddings: int = 256
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    conv_kernel: int = 3
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        if self.layer_types is None:
            self.layer_types = [
                "full_attention" if i % 2 else "linear_attention" for i in range(self.num_hidden_layers)
            ]
        super().__post_init__(**kwargs)


__all__ = ["LaurelConfig"]
