"""Answers of a given form: which tokens may come next, by a grammar that llguidance follows."""

import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from porter.runtime.errors import RequestError

MaskWords = npt.NDArray[np.int32]


@dataclass(frozen=True)
class StructuredOutputs:
    """The form that an answer must have, exactly one of: a JSON schema (an object or its text), any JSON object, a
    regular expression, one of several texts. RequestError for a form that can't be followed."""

    json: dict[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        given = (self.json is not None, self.json_object, self.regex is not None, self.choice is not None)
        if sum(given) != 1:
            raise RequestError("structured_outputs needs exactly one of json, json_object, regex and choice")
        flaw = _llguidance().LLMatcher.validate_grammar(self.grammar())
        if flaw:
            raise RequestError(f"structured_outputs can't be followed: {flaw}")

    def grammar(self) -> str:
        """The form in llguidance's own words."""
        matcher = _llguidance().LLMatcher
        try:
            if self.regex is not None:
                return str(matcher.grammar_from_regex(self.regex))
            if self.choice is not None:
                return str(matcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in self.choice)))
            return str(matcher.grammar_from_json_schema({"type": "object"} if self.json_object else self.json))
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError(f"structured_outputs can't be read: {error}") from None


@dataclass(frozen=True)
class AllowedTokens:
    """What may come next in `rows` int64 [m]: `masks` int32 [m, words], 32 tokens to a word, the lowest bit first."""

    rows: torch.Tensor
    masks: torch.Tensor

    def forbidden(self, vocab_size: int) -> torch.Tensor:
        """True where a token may not come, bool [m, vocab_size]."""
        bits = torch.arange(32, dtype=torch.int32, device=self.masks.device)
        unset = (self.masks.unsqueeze(-1) >> bits).bitwise_and(1) == 0
        return unset.flatten(1)[:, :vocab_size]


class Matcher:
    """Follows one answer through its grammar."""

    def __init__(self, matcher: Any, num_words: int) -> None:
        self._matcher = matcher
        self._num_words = num_words

    def mask(self) -> MaskWords:
        """One bit a token, set if it may come next, 32 to a word from the lowest: int32 [num_words]."""
        words = np.zeros(self._num_words, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return words

    def accept(self, token_id: int) -> None:
        """Go on by a token that the mask allowed."""
        self._matcher.consume_token(token_id)

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())


class GrammarCompiler:
    """Makes matchers for a vocabulary of `vocab_size` tokens, of which `eos_token_ids` end an answer."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        try:
            hf = importlib.import_module("llguidance.hf")
            size = max(vocab_size, len(tokenizer))
            self._tokenizer = hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(eos_token_ids))
        except ValueError as error:
            raise RequestError(f"structured_outputs can't be followed with this tokenizer: {error}") from None
        self._num_words = -(-size // 32)

    def matcher(self, wanted: StructuredOutputs) -> Matcher:
        """A matcher at the start of an answer."""
        matcher = _llguidance().LLMatcher(self._tokenizer, wanted.grammar(), log_level=0)
        if matcher.is_error():
            raise RequestError(f"structured_outputs can't be followed: {matcher.get_error()}")
        return Matcher(matcher, self._num_words)


def _llguidance() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ModuleNotFoundError:
        raise RequestError("structured_outputs needs llguidance", 'pip install "porter-lm[serve]"') from None
