"""Answers of a given form, on a model whose weights are random and would never keep to it by themselves."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from porter.runtime.engine import LLM, SamplingParams
from porter.runtime.errors import RequestError
from porter.runtime.structured_outputs import StructuredOutputs

PORT = Path(__file__).parents[1] / "models" / "handwritten_llama.py"
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "kind": {"enum": ["a", "bc"]}},
    "required": ["n", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(chat_checkpoint: Path) -> Iterator[LLM]:
    llm = LLM(chat_checkpoint, port=PORT, device="cpu", num_blocks=64, max_model_len=256, max_num_batched_tokens=32)
    yield llm
    llm.shutdown()


def texts(llm: LLM, wanted: StructuredOutputs, **options: Any) -> list[Any]:
    options = {"temperature": 1.0, "n": 8, "seed": 3, "max_tokens": 100} | options
    params = SamplingParams(structured_outputs=wanted, **options)
    return llm.generate("Say:", params, use_tqdm=False)[0].outputs


def test_every_answer_fits_the_schema(llm: LLM) -> None:
    for sample in texts(llm, StructuredOutputs(json=SCHEMA)):
        if sample.finish_reason == "length":
            continue  # white space and digits may go on for ever
        answer = json.loads(sample.text)
        assert isinstance(answer["n"], int)
        assert answer["kind"] in ("a", "bc")
        assert answer.keys() == {"n", "kind"}


def test_an_answer_ends_where_nothing_can_follow(llm: LLM) -> None:
    choice = StructuredOutputs(choice=("no", 'yes, "quoted"'))
    tokenizer: Any = llm.tokenizer
    y = tokenizer.convert_tokens_to_ids("y")
    samples = [*texts(llm, choice), *texts(llm, choice, logit_bias={y: 50.0})]
    assert {sample.finish_reason for sample in samples} == {"stop"}
    assert {sample.text for sample in samples} == {"no", 'yes, "quoted"'}


def test_the_end_of_text_counts_where_an_answer_may_end(llm: LLM) -> None:
    samples = texts(llm, StructuredOutputs(regex="[ab]{2,200}"), logit_bias={1: 5.0})
    ended = [sample for sample in samples if sample.finish_reason == "stop"]
    assert ended
    assert all(re.fullmatch("[ab]{2,}", sample.text) for sample in samples)
    assert all(sample.token_ids[-1] == 1 for sample in ended)


def test_rows_without_a_form_are_left_alone(llm: LLM) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=12)
    bound = SamplingParams(temperature=0.0, max_tokens=12, structured_outputs=StructuredOutputs(regex="[0-9]+"))
    alone = llm.generate("Say:", free, use_tqdm=False)[0].outputs[0].token_ids
    together = llm.generate(["Say:", "Say:"], [bound, free], use_tqdm=False)
    assert together[1].outputs[0].token_ids == alone
    assert together[0].outputs[0].text.isdigit()


def test_any_json_object(llm: LLM) -> None:
    samples = texts(llm, StructuredOutputs(json_object=True), n=4)
    assert all(sample.text.lstrip().startswith("{") for sample in samples)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ("b",)}, "exactly one"),
        ({"regex": "((("}, "unclosed group"),
        ({"json": {"type": "nonsense"}}, "nonsense"),
        ({"json": "{"}, "can't be"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "can't be followed"),
    ],
)
def test_what_can_not_be_followed_is_one_line(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        StructuredOutputs(**wanted)


def test_min_tokens_does_not_go_with_a_form() -> None:
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(structured_outputs=StructuredOutputs(regex="a"), min_tokens=2)


def test_a_form_needs_a_tokenizer(chat_checkpoint: Path) -> None:
    llm = LLM(chat_checkpoint, port=PORT, device="cpu", num_blocks=64, max_model_len=256, skip_tokenizer_init=True)
    with pytest.raises(RequestError, match="tokenizer"):
        llm.generate(
            {"prompt_token_ids": [5]}, SamplingParams(structured_outputs=StructuredOutputs(regex="a")), use_tqdm=False
        )
    assert not llm.llm_engine.has_unfinished_requests()
