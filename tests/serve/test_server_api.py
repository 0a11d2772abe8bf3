"""What OpenAI's own client gets from a real server: always what the same model answers offline."""

import json
from typing import Any

import openai
import pytest
from openai import OpenAI

from porter import __version__
from porter.runtime.engine import LLM, SamplingParams

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}},
    "required": ["kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server: Any) -> OpenAI:
    found: OpenAI = server.openai()
    return found


def answer(llm: LLM, prompt: str, **options: Any) -> list[str]:
    outputs = llm.generate(prompt, SamplingParams(**({"temperature": 1.0} | options)), use_tqdm=False)
    return [sample.text for sample in outputs[0].outputs]


def test_it_tells_what_it_serves(server: Any, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").to_dict()["max_model_len"] == 4096
    with server.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/version").json() == {"version": __version__}


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 7, "top_k": 20}, {"seed": 7, "n": 3, "top_p": 0.9}])
def test_a_completion_is_the_offline_one(client: OpenAI, offline: LLM, options: dict[str, Any]) -> None:
    extra = {name: options[name] for name in options.keys() & {"top_k"}}
    given: Any = {name: value for name, value in options.items() if name not in extra}
    found = client.completions.create(model="tiny", prompt="Once", max_tokens=20, extra_body=extra, **given)
    assert [choice.text for choice in found.choices] == answer(offline, "Once", max_tokens=20, **options)
    assert found.usage is not None
    assert found.usage.prompt_tokens == len("Once")


def test_prompts_may_be_listed_and_may_be_token_ids(server: Any, client: OpenAI, offline: LLM) -> None:
    texts = [answer(offline, prompt, temperature=0.0, max_tokens=5)[0] for prompt in ("one", "two")]
    found = client.completions.create(model="tiny", prompt=["one", "two"], temperature=0, max_tokens=5)
    assert [choice.text for choice in found.choices] == texts
    with server.http() as http:
        ids = http.post("/tokenize", json={"prompt": "two"}).json()["tokens"]
    again = client.completions.create(model="tiny", prompt=[ids, ids], temperature=0, max_tokens=5)
    assert [choice.text for choice in again.choices] == [texts[1]] * 2


def test_tokens_and_back(server: Any) -> None:
    with server.http() as http:
        tokens = http.post("/tokenize", json={"prompt": "häßlich", "return_token_strs": True}).json()
        assert len(tokens["token_strs"]) == tokens["count"] == len("häßlich".encode())
        assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "häßlich"}
        chat = http.post("/tokenize", json={"messages": MESSAGES}).json()
        assert http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"].endswith("<|assistant|>")


def test_a_stream_adds_up_to_the_whole(client: OpenAI, offline: LLM) -> None:
    stream = client.completions.create(
        model="tiny",
        prompt=["one", "two"],
        n=2,
        seed=3,
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, reasons, usage = [""] * 4, [""] * 4, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    expected = [text for prompt in ("one", "two") for text in answer(offline, prompt, n=2, seed=3, max_tokens=30)]
    assert texts == expected
    assert set(reasons) <= {"length", "stop"}
    assert usage is not None
    assert usage.prompt_tokens == 6


def test_echo_gives_the_logprobs_of_the_prompt(client: OpenAI, offline: LLM) -> None:
    found = client.completions.create(model="tiny", prompt="abc", max_tokens=2, temperature=0, echo=True, logprobs=3)
    params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=3, prompt_logprobs=3)
    [output] = offline.generate("abc", params, use_tqdm=False)
    logprobs: Any = found.choices[0].logprobs
    assert found.choices[0].text == "abc" + output.outputs[0].text
    assert logprobs.tokens[:3] == ["a", "b", "c"]
    assert logprobs.token_logprobs[0] is None
    positions = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
    expected = [next(iter(each.values())).logprob for each in positions if each is not None]
    assert logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_a_prompt_can_be_scored_without_going_on(client: OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert found.choices[0].text == "abc"
    assert found.usage is not None
    assert found.usage.completion_tokens == 0


def test_a_chat_is_the_offline_one(client: OpenAI, offline: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12)
    expected = offline.chat(MESSAGES, params, use_tqdm=False)[0].outputs[0].text
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=12)
    assert whole.choices[0].message.content == expected
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=12, stream=True
    )
    pieces = [chunk.choices[0].delta for chunk in stream]
    assert pieces[0].role == "assistant"
    assert "".join(piece.content or "" for piece in pieces) == expected


def test_chat_logprobs_rank_the_alternatives(client: OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    content: Any = found.choices[0].logprobs and found.choices[0].logprobs.content
    assert len(content) == 4
    for each in content:
        ranked = [top.logprob for top in each.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)
        assert each.top_logprobs[0].token == each.token


def test_a_stop_text_never_shows_in_a_stream(client: OpenAI, offline: LLM) -> None:
    text = answer(offline, "Once", seed=7, max_tokens=60)[0]
    stop = text[20:23]
    stream = client.completions.create(model="tiny", prompt="Once", seed=7, max_tokens=60, stop=[stop], stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].to_dict()["stop_reason"] == stop


def test_an_answer_keeps_to_its_form(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "kind", "schema": SCHEMA}}
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=1, max_tokens=2000, response_format=form
    )
    assert found.choices[0].finish_reason == "stop"
    assert json.loads(found.choices[0].message.content or "")["kind"] in ("a", "b")
    choice = {"structured_outputs": {"choice": ["yes", "no"]}}
    stream = client.completions.create(model="tiny", prompt="x", seed=1, stream=True, extra_body=choice)
    assert "".join(chunk.choices[0].text for chunk in stream) in ("yes", "no")


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("completions", {"prompt": "a", "model": "other"}, 404, "other"),
        ("completions", {"prompt": "a", "max_tokens": 5000}, 400, "context length"),
        ("completions", {"prompt": "a" * 4096}, 400, "context length"),
        ("completions", {"prompt": ""}, 400, "empty"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": [999]}, 400, "999"),
        ("completions", {"prompt": "a", "best_of": 3}, 400, "best_of"),
        ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
        ("completions", {"prompt": "a", "temperature": "1"}, 400, "temperature"),
        ("completions", {"prompt": "a", "top_p": 0}, 400, "top_p"),
        ("completions", {"prompt": "a", "n": 2, "temperature": 0}, 400, "temperature"),
        ("completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ("completions", {"prompt": "a", "stop": [""]}, 400, "stop"),
        ("completions", {"prompt": "a", "no_such_field": 1}, 400, "no_such_field"),
        ("completions", {"prompt": "\ud800"}, 400, "prompt"),
        ("completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream"),
        ("completions", {"prompt": "a", "structured_outputs": {"regex": "((("}}, 400, "unclosed"),
        ("completions", {}, 400, "prompt"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "no tools here"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "content"),
        ("chat/completions", {"messages": MESSAGES, "tools": [{"type": "function"}]}, 400, "tools"),
        ("chat/completions", {"messages": MESSAGES, "top_logprobs": 2}, 400, "logprobs"),
        ("chat/completions", {"messages": MESSAGES, "response_format": {"type": "xml"}}, 400, "response_format"),
    ],
)
def test_what_can_not_be_served_is_told_as_openai_would(
    server: Any, path: str, body: dict[str, Any], status: int, named: str
) -> None:
    with server.http() as http:
        found = http.post(
            f"/v1/{path}", content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert named in error["message"]
    assert ".py" not in error["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'"text"', b"\xff\xfe", b'{"prompt": ' + b"[" * 5000])
def test_a_body_that_is_no_request_is_400(server: Any, content: bytes) -> None:
    with server.http() as http:
        found = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert found.status_code == 400
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_a_key_is_asked_for(server: Any) -> None:
    with pytest.raises(openai.AuthenticationError):
        server.openai("another").models.list()


def test_an_answer_carries_the_id_of_its_request(server: Any) -> None:
    with server.http() as http:
        assert http.get("/health", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
        made = http.get("/health", headers={"X-Request-Id": "no good"}).headers["X-Request-Id"]
        assert made not in ("", "no good")
        body = {"prompt": "a", "max_tokens": 1}
        found = http.post("/v1/completions", json=body, headers={"X-Request-Id": "abc-2"})
        assert found.json()["id"] == "cmpl-abc-2"


def test_the_metrics_count(server: Any, client: OpenAI) -> None:
    before = server.metrics()
    client.completions.create(model="tiny", prompt="abc", max_tokens=7, extra_body={"ignore_eos": True})
    after = server.metrics()
    grown = {name: after[name] - before[name] for name in before}
    assert grown["prompt_tokens_total"] == 3
    assert grown["generation_tokens_total"] == 7
    assert grown["time_to_first_token_seconds_count"] == 1
    assert grown["inter_token_latency_seconds_count"] == 6
    assert after["num_requests_running"] == after["kv_cache_usage_perc"] == 0
