"""A tiny random Llama on disk, what transformers answers with it, and an engine that serves it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from porter.runtime.engine import LLM

PORT = Path(__file__).parents[1] / "models" / "handwritten_llama.py"
VOCAB = 96


@dataclass(frozen=True)
class TinyLlama:
    """A checkpoint folder and the transformers model that it holds."""

    folder: Path
    model: Any

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [len(token_ids), vocab] of one full forward."""
        with torch.no_grad():
            logits: torch.Tensor = self.model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        return logits

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy continuation, each token from a full forward of all before it; no token stops it."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def prompts_of(*lengths: int) -> list[list[int]]:
    """Random prompts of these lengths that start alike."""
    generator = torch.Generator().manual_seed(1)
    longest = torch.randint(3, VOCAB, (max(lengths),), generator=generator).tolist()
    return [[*longest[: length - 1], 3 + length % 7] for length in lengths]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], TinyLlama]:
    """Makes a Llama of 2 layers, 4 heads and so many KV heads with random weights."""

    @cache
    def make(num_kv_heads: int = 2) -> TinyLlama:
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=num_kv_heads,
            max_position_embeddings=128,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        folder = tmp_path_factory.mktemp("llama")
        model.save_pretrained(folder)
        return TinyLlama(folder, model)

    return make


@pytest.fixture
def serve() -> Iterator[Callable[..., LLM]]:
    """Serves a checkpoint with the hand-written port on the CPU; stops it after the test."""
    started: list[LLM] = []

    def start(folder: Path, **options: Any) -> LLM:
        defaults: dict[str, Any] = {"num_blocks": 64, "block_size": 4, "max_model_len": 64}
        defaults |= {"port": PORT, "device": "cpu", "skip_tokenizer_init": True}
        started.append(LLM(folder, **(defaults | options)))
        return started[-1]

    yield start
    for llm in started:
        llm.shutdown()


@pytest.fixture
def prompts() -> Callable[..., list[list[int]]]:
    return prompts_of
