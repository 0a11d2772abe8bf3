# Copyright 2026 The Cedar authors. Licensed under the Apache License, Version 2.0.
"""Cedar configuration."""

from transformers.configuration_utils import PreTrainedConfig


class CedarConfig(PreTrainedConfig):
    model_type = "cedar"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_experts": "num_local_experts"}

    vocab_size: int = 256
    hidden_size: int = 64
    intermediate_size: int = 80
    moe_intermediate_size: int = 40
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 128
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_dropout: float = 0.0
    num_local_experts: int = 6
    num_experts_per_tok: int = 2
    first_dense_layers: int = 1
    norm_topk_prob: bool = True
    router_jitter_noise: float = 0.0
    output_router_logits: bool = False


__all__ = ["CedarConfig"]
