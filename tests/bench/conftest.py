"""A tiny random Llama on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes it once."""
    folder = tmp_path_factory.mktemp("bench-llama")

    def make() -> Path:
        if not any(folder.iterdir()):
            config = LlamaConfig(
                vocab_size=96,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                eos_token_id=2,
                tie_word_embeddings=False,
            )
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(folder)
        return folder

    return make
