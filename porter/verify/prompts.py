"""The token ids that all checks of a case share: a few prompts of different lengths."""

from pathlib import Path
from typing import Any

import torch

from porter.runtime.checkpoint import load_tokenizer
from porter.runtime.config import resolve_max_model_len
from porter.runtime.errors import EngineError

# Primes that no size of a tiny model shares, so that an axis over tokens is known by its length; one is shorter and the
# others longer than a tiny sliding window.
LENGTHS = (5, 11, 23, 37)
# Beyond what bfloat16 counts exactly, and beyond the length from which a tiny config scales its rotations.
LONG = 307
_TEXTS = (
    "The capital of France is",
    "Water boils at one hundred degrees at sea level, and at a lower temperature",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "Once upon a time there was a small lighthouse at the end of the world. Its keeper counted the ships that "
    "passed in the night, wrote each into a long book, and never",
)


def random_prompts(config: Any, seed: int = 0) -> list[list[int]]:
    """Prompts of LENGTHS and one of LONG tokens (or what the model has positions for), without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = int(config.get_text_config().vocab_size)
    lengths = (*LENGTHS, min(LONG, resolve_max_model_len(config, None)))
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def text_prompts(folder: Path, config: Any, trust_remote_code: bool) -> list[list[int]]:
    """A few texts in the checkpoint's tokens; random tokens if it has no tokenizer that fits its vocabulary."""
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code)
    except EngineError:
        return random_prompts(config)
    encoded = [list(tokenizer(text)["input_ids"]) for text in _TEXTS]
    usable = all(len(ids) > 1 and max(ids) < config.get_text_config().vocab_size for ids in encoded)
    return encoded if usable else random_prompts(config)  # transformers makes empty tokenizers where files are missing
