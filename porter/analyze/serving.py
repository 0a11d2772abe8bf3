"""Config fields that serving fixes."""

from __future__ import annotations

from typing import Any

# Config fields that serving fixes, with the reason; a port is for these values only.
SERVING: dict[str, tuple[Any, str]] = {
    "use_cache": (False, "the paged cache replaces the model's own"),
    "output_attentions": (False, "serving returns no attention maps"),
    "output_hidden_states": (False, "serving returns no inner states"),
    "output_router_logits": (False, "router logits serve the training loss"),
    "return_dict": (True, "the container of the outputs does not change them"),
    "use_return_dict": (True, "the container of the outputs does not change them"),
    "_attn_implementation": ("eager", "the eager path is the reference of all attention implementations"),
    "attn_implementation": ("eager", "the eager path is the reference of all attention implementations"),
    "_flash_attn_2_enabled": (False, "the eager path is the reference of all attention implementations"),
    "use_flash_attn": (False, "the eager path is the reference of all attention implementations"),
    "use_flash_attention": (False, "the eager path is the reference of all attention implementations"),
    "use_flash_attention_2": (False, "the eager path is the reference of all attention implementations"),
    "flash_attn": (False, "the eager path is the reference of all attention implementations"),
    "add_cross_attention": (False, "a causal language model has no encoder"),
    "is_encoder_decoder": (False, "a causal language model has no encoder"),
    "is_decoder": (True, "a causal language model attends to the past only"),
    "cross_attention_hidden_size": (None, "a causal language model has no encoder"),
    "pretraining_tp": (1, "it only splits the same sums into slices"),
    "slow_but_exact": (False, "it only splits the same sums into slices"),
    "gradient_checkpointing": (False, "training only"),
    "torchscript": (False, "tracing only"),
    "reorder_and_upcast_attn": (False, "the same attention in another order of operations"),
    "use_bidirectional_attention": (False, "serving is causal"),
    "use_dynamic_ntk": (False, "frequencies that grow with the prompt would turn keys already cached"),
    "use_logn_attn": (False, "queries scaled by their position are no rotation"),
    "pre_seq_len": (None, "a trained prefix is an adapter of its own"),
    "chunk_size_feed_forward": (0, "chunking the MLP does not change it"),
    "dtype": (None, "the engine chooses the dtype"),
    "torch_dtype": (None, "the engine chooses the dtype"),
}

# Those that change what a model computes: a port must not be built for a config with another value.
BINDING = frozenset(
    {
        "add_cross_attention",
        "is_decoder",
        "use_bidirectional_attention",
        "use_dynamic_ntk",
        "use_logn_attn",
        "pre_seq_len",
    }
)
