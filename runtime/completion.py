"""One sample while it is generated: its text, its logprobs and what makes it stop."""

from typing import Any

from porter.runtime.detokenizer import IncrementalDetokenizer
from porter.runtime.outputs import CompletionOutput, TokenLogprobs
from porter.runtime.sampling import RequestOutputKind
from porter.runtime.sequence import Sequence
from porter.runtime.structured_outputs import Matcher


class Completion:
    """Takes the tokens of a sequence, decides when it is finished and renders its CompletionOutput."""

    def __init__(self, seq: Sequence, tokenizer: Any | None, eos_ids: frozenset[int], max_model_len: int) -> None:
        self.seq = seq
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.cumulative_logprob = 0.0
        self.logprobs: list[TokenLogprobs] = []
        self._text = ""
        self._ended_by_token = False
        self._eos_ids = frozenset() if seq.params.ignore_eos else eos_ids
        length = max_model_len - len(seq.prompt_token_ids)
        self.max_tokens = min(length, seq.params.max_tokens or length)
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None and seq.params.detokenize:
            skip = seq.params.skip_special_tokens
            self._detokenizer = IncrementalDetokenizer(tokenizer, seq.prompt_token_ids, skip)
        # Text that nobody looks at before the end is decoded at the end; a form must see every token
        is_final = seq.params.output_kind is RequestOutputKind.FINAL_ONLY
        self._lazy = is_final and not seq.params.stop_strings and seq.matcher is None
        self._num_decoded = 0
        self._num_sent_tokens = 0
        self._num_sent_chars = 0

    def append(self, token_id: int) -> None:
        """Add a sampled token; sets `finish_reason` if it was the last."""
        self.seq.output_token_ids.append(token_id)
        num_output = len(self.seq.output_token_ids)
        if self._lazy and num_output < self.max_tokens and token_id not in self.seq.stop_ids:
            return
        if num_output >= self.seq.params.min_tokens:
            self._check_token(token_id)
        if self.seq.matcher is not None:
            self._follow_form(self.seq.matcher, token_id)
        if self.finish_reason is None and not self._lazy:
            self._decode(num_output)
        if self.finish_reason is None and num_output >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self._finish_text(num_output)

    def abort(self) -> None:
        """End the sample at what it has."""
        self.finish_reason = "abort"
        self._finish_text(len(self.seq.output_token_ids))

    def render(self) -> CompletionOutput:
        """The sample so far, or what is new since the last call for RequestOutputKind.DELTA."""
        params = self.seq.params
        first_token = first_char = 0
        end_char = len(self._text)
        if params.output_kind is RequestOutputKind.DELTA:
            first_token, first_char = self._num_sent_tokens, self._num_sent_chars
            end_char = max(end_char - self._held_back(), first_char)
            self._num_sent_tokens, self._num_sent_chars = len(self.seq.output_token_ids), end_char
        return CompletionOutput(
            index=self.seq.index,
            text=self._text[first_char:end_char],
            token_ids=self.seq.output_token_ids[first_token:],
            cumulative_logprob=None if params.logprobs is None else self.cumulative_logprob,
            logprobs=None if params.logprobs is None else self.logprobs[first_token:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _check_token(self, token_id: int) -> None:
        if token_id in self._eos_ids:
            self.finish_reason = "stop"
        elif token_id in self.seq.params.stop_ids:
            self.finish_reason, self.stop_reason = "stop", token_id
        self._ended_by_token = self.finish_reason is not None

    def _follow_form(self, matcher: Matcher, token_id: int) -> None:
        matcher.accept(token_id)
        if self.finish_reason is None and matcher.complete:
            self.finish_reason = "stop"

    def _decode(self, num_tokens: int) -> None:
        if self._detokenizer is None:
            return
        piece = self._detokenizer.append(self.seq.output_token_ids[self._num_decoded : num_tokens])
        self._num_decoded = num_tokens
        self._add_text(piece)

    def _finish_text(self, num_tokens: int) -> None:
        if self._detokenizer is None or isinstance(self.stop_reason, str):
            return
        include = self.seq.params.include_stop_str_in_output
        self._decode(num_tokens - (self._ended_by_token and not include))
        if not isinstance(self.stop_reason, str):
            self._add_text(self._detokenizer.finish())

    def _add_text(self, piece: str) -> None:
        known = len(self._text)
        self._text += piece
        stops = self.seq.params.stop_strings
        if not piece or not stops or len(self.seq.output_token_ids) < self.seq.params.min_tokens:
            return
        found = [(self._text.find(stop, max(known - len(stop) + 1, 0)), stop) for stop in stops]
        place, stop = min(((place, stop) for place, stop in found if place >= 0), default=(-1, ""))
        if place < 0:
            return
        self.finish_reason, self.stop_reason = "stop", stop
        self._text = self._text[: place + len(stop) if self.seq.params.include_stop_str_in_output else place]

    def _held_back(self) -> int:
        """Characters that may yet turn out to start a stop string."""
        params = self.seq.params
        if self.finish_reason is not None or params.include_stop_str_in_output:
            return 0
        return max((len(stop) - 1 for stop in params.stop_strings), default=0)
