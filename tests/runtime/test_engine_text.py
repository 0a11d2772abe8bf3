"""Text: pieces join to the whole, characters are never cut, stop strings end where they should."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from porter.runtime.completion import Completion
from porter.runtime.detokenizer import IncrementalDetokenizer
from porter.runtime.sampling import RequestOutputKind, SamplingParams
from porter.runtime.sequence import Sequence

WORDS = ["<s>", "</s>", "\u2581Hello", "\u2581world", "!", "\u2581", "wor", "ld", "\n"]


class _Fast:
    """The part of a transformers tokenizer that the runtime calls."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def sentencepiece_like() -> _Fast:
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    vocab = {piece: i for i, piece in enumerate([*WORDS, *bytes_])}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return _Fast(tokenizer)


def byte_level() -> _Fast:
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _Fast(tokenizer)


def ids(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


def utf8(text: str) -> list[int]:
    return [len(WORDS) + byte for byte in text.encode()]


def completion(params: SamplingParams, prompt: list[int], tokenizer: Any, length: int = 100) -> Completion:
    return Completion(Sequence("r", prompt, params), tokenizer, frozenset(ids("</s>")), length)


def feed(done: Completion, tokens: list[int]) -> list[str]:
    """The deltas of a completion, up to its end."""
    pieces = []
    for token in tokens:
        done.append(token)
        pieces.append(done.render().text)
        if done.finish_reason:
            break
    return pieces


def test_the_first_word_keeps_its_leading_space() -> None:
    detokenizer = IncrementalDetokenizer(sentencepiece_like(), ids("<s>", "\u2581Hello"))
    assert [detokenizer.append([token]) for token in ids("\u2581world", "!")] == [" world", "!"]


def test_an_answer_after_special_tokens_only_starts_without_space() -> None:
    detokenizer = IncrementalDetokenizer(sentencepiece_like(), ids("<s>"))
    assert [detokenizer.append([token]) for token in ids("\u2581Hello", "\u2581world")] == ["Hello", " world"]


def test_a_character_comes_out_whole() -> None:
    detokenizer = IncrementalDetokenizer(sentencepiece_like(), ids("\u2581Hello"))
    assert [detokenizer.append([token]) for token in utf8("\u20ac")] == ["", "", "\u20ac"]


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    detokenizer = IncrementalDetokenizer(byte_level(), [])
    first = byte_level().encode("\u20ac")[0]
    assert detokenizer.append([first]) == ""
    assert detokenizer.finish() == "\ufffd"


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(min_size=1, max_size=8), output=st.text(max_size=20), chunk=st.integers(1, 4))
def test_joined_pieces_are_the_text(prompt: str, output: str, chunk: int) -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode(output)
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode(prompt))
    pieces = [detokenizer.append(tokens[i : i + chunk]) for i in range(0, len(tokens), chunk)]
    assert "".join(pieces) + detokenizer.finish() == output


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
def test_a_stop_string_ends_the_text_before_it(kind: RequestOutputKind) -> None:
    tokenizer = byte_level()
    done = completion(SamplingParams(stop=["STOP"], max_tokens=None, output_kind=kind), [0], tokenizer)
    for token in tokenizer.encode("one STOP two"):
        done.append(token)
        if done.finish_reason:
            break
    assert (done.finish_reason, done.stop_reason) == ("stop", "STOP")
    assert done.render().text == "one "


def test_no_delta_holds_a_piece_of_a_stop_string() -> None:
    tokenizer = byte_level()
    params = SamplingParams(stop=["STOP"], max_tokens=None, output_kind=RequestOutputKind.DELTA)
    pieces = feed(completion(params, [0], tokenizer), tokenizer.encode("one STO STOP two"))
    assert "".join(pieces) == "one STO "
    assert not any("S" in piece for piece in pieces[:6])


def test_the_stop_string_can_be_included() -> None:
    tokenizer = byte_level()
    params = SamplingParams(stop="STOP", include_stop_str_in_output=True, max_tokens=None)
    assert feed(completion(params, [0], tokenizer), tokenizer.encode("one STOP two"))[-1] == "one STOP"


def test_the_end_token_has_no_text_and_no_reason() -> None:
    done = completion(SamplingParams(skip_special_tokens=False), ids("<s>"), sentencepiece_like())
    pieces = feed(done, ids("\u2581Hello", "</s>", "!"))
    assert pieces[-1] == " Hello"
    assert (done.finish_reason, done.stop_reason) == ("stop", None)
    assert done.render().token_ids == ids("\u2581Hello", "</s>")


def test_a_stop_token_is_named() -> None:
    (stop,) = ids("!")
    done = completion(SamplingParams(stop_token_ids=[stop]), ids("<s>"), sentencepiece_like())
    feed(done, [*ids("\u2581Hello"), stop])
    assert (done.finish_reason, done.stop_reason, done.render().text) == ("stop", stop, "Hello")


def test_ignore_eos_and_max_tokens() -> None:
    done = completion(SamplingParams(ignore_eos=True, max_tokens=2), ids("<s>"), sentencepiece_like())
    feed(done, ids("</s>", "\u2581Hello", "!"))
    assert (done.finish_reason, len(done.render().token_ids)) == ("length", 2)


def test_the_model_length_ends_a_text() -> None:
    done = completion(SamplingParams(max_tokens=None), ids("<s>", "!"), None, length=4)
    feed(done, ids("!", "!", "!"))
    assert (done.finish_reason, len(done.render().token_ids)) == ("length", 2)


def test_min_tokens_holds_back_stop_strings() -> None:
    tokenizer = byte_level()
    params = SamplingParams(stop="a", min_tokens=3, max_tokens=None)
    done = completion(params, [0], tokenizer)
    assert feed(done, tokenizer.encode("aabca"))[-1] == "aabc"
