# Copyright 2026 The Acorn authors. Licensed under the Apache License, Version 2.0.
"""Acorn configuration."""

from transformers.configuration_utils import PreTrainedConfig


class AcornConfig(PreTrainedConfig):
    model_type = "acorn"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 320
    hidden_size: int = 64
    intermediate_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 24
    hidden_act: str = "silu"
    max_position_embeddings: int = 256
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    query_pre_attn_scalar: int = 20
    embedding_multiplier: float = 6.0
    sliding_window: int | None = 16
    layer_types: list[str] | None = None
    attention_dropout: float = 0.0
    resid_pdrop: float = 0.1

    def __post_init__(self, **kwargs):
        if self.layer_types is None:
            self.layer_types = [
                "full_attention" if i % 2 else "sliding_attention" for i in range(self.num_hidden_layers)
            ]
        super().__post_init__(**kwargs)


__all__ = ["AcornConfig"]
