"""Turns token ids into text as they come."""

from collections.abc import Sequence
from typing import Any

# Tokens of the prompt that are decoded along, so that the output's first piece keeps its leading space
_CONTEXT_TOKENS = 6
_REPLACEMENT = "\ufffd"


class IncrementalDetokenizer:
    """Text of a growing sequence; joined pieces equal the text of all tokens after the prompt.

    Tokens between `_prefix` and `_read` were already given out as text and are decoded along, because what a token
    reads as may depend on those before it. A piece that ends within a multi-byte character waits for the rest.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._tokens = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._prefix = 0
        self._read = len(self._tokens)

    def append(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that is now certain."""
        self._tokens += token_ids
        return self._advance(final=False)

    def finish(self) -> str:
        """The rest of the text, an incomplete character as replacement characters."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._decode(self._tokens[self._prefix : self._read])
        text = self._decode(self._tokens[self._prefix :])
        if len(text) <= len(before) or (text.endswith(_REPLACEMENT) and not final):
            return ""
        self._prefix, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text
