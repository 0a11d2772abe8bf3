"""`POST /v1/completions`."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from porter.runtime.outputs import TokenLogprobs
from porter.runtime.sampling import SamplingParams
from porter.serve.answers import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    chosen,
    finite,
    now,
    num_generated,
    spelled,
    usage,
)
from porter.serve.engine_client import Generation
from porter.serve.messages import RequestDelta, SampleDelta
from porter.serve.protocol import CompletionRequest
from porter.serve.sampling import check_length, check_logprobs, check_token_ids, sampling_params
from porter.serve.service import Service, merged
from porter.serve.streaming import EventStream, event, while_connected


@dataclass
class _Call:
    """One request under way; `token_ids` are its prompts, `texts` what is echoed of them and `starts` the text of the
    first token of each (both empty if nothing is)."""

    service: Service
    body: CompletionRequest
    id: str
    model: str
    texts: list[str]
    starts: list[str]
    token_ids: list[list[int]]
    params: SamplingParams
    created: int = field(default_factory=now)

    def answer(self, choices: list[CompletionChoice]) -> CompletionAnswer:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


async def create_completion(service: Service, body: CompletionRequest, request: Request, request_id: str) -> Response:
    """Answer one request."""
    call = await _prepared(service, body, f"cmpl-{request_id}")
    generations = service.submit(call.token_ids, call.params)
    if body.stream:
        return EventStream(_events(call, generations), lambda: service.client.abort(generations))
    deltas = await while_connected(request.receive, service.collect(generations))
    return JSONResponse(_whole(call, deltas))


async def _prepared(service: Service, body: CompletionRequest, id: str) -> _Call:
    model = service.check_model(body.model)
    most = service.options.max_logprobs
    check_logprobs(body.logprobs, most, "logprobs")
    check_logprobs(body.prompt_logprobs, most, "prompt_logprobs")
    texts, starts, token_ids = await _prompts(service, body)
    params = sampling_params(
        body,
        service.defaults,
        max(body.max_tokens, 1) if body.max_tokens is not None else None,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo and body.logprobs is not None else body.prompt_logprobs,
    )
    asked = body.max_tokens if "max_tokens" in body.model_fields_set else None
    for prompt in token_ids:
        check_length(prompt, params, service.facts, asked)
    return _Call(service, body, id, model, texts, starts, token_ids, params)


async def _prompts(service: Service, body: CompletionRequest) -> tuple[list[str], list[str], list[list[int]]]:
    """The prompts as texts, their first tokens as texts (both only if they are to be echoed), and as token ids."""
    listed: Sequence[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(listed[0], int):
        listed = [listed]
    tokenizing = service.tokenizing
    token_ids = [
        await tokenizing.encode(each, body.add_special_tokens) if isinstance(each, str) else list(each)
        for each in listed
    ]
    if not body.echo:
        return [], [], token_ids
    for each in token_ids:
        check_token_ids(each, service.facts)
    texts = [each if isinstance(each, str) else await tokenizing.decode(each) for each in listed]
    return texts, [await tokenizing.decode(each[:1]) for each in token_ids], token_ids


def _whole(call: _Call, deltas: Sequence[RequestDelta]) -> CompletionAnswer:
    choices = []
    for place, delta in enumerate(deltas):
        for index, sample in sorted(delta.samples.items()):
            if call.body.max_tokens == 0:
                sample = SampleDelta(index, "", [], [], "length")
            delta.samples[index] = sample
            choices.append(_choice(call, place, sample, delta))
    answer = call.answer(choices)
    cached = sum(delta.num_cached_tokens for delta in deltas)
    answer["usage"] = usage(call.token_ids, num_generated(deltas), cached)
    return answer


def _choice(call: _Call, place: int, sample: SampleDelta, delta: RequestDelta) -> CompletionChoice:
    body = call.body
    prompt = call.texts[place] if body.echo else ""
    choice: CompletionChoice = {
        "index": place * call.params.n + sample.index,
        "text": prompt + sample.text,
        "logprobs": None,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
    }
    if body.logprobs is not None:
        choice["logprobs"] = _logprobs(body.logprobs, sample, 0)
        if body.echo:
            prompt_logprobs = (delta.prompt_logprobs or [])[1:]
            choice["logprobs"] = _echoed_logprobs(body.logprobs, call.starts[place], prompt_logprobs, sample)
    if body.return_token_ids:
        choice["token_ids"], choice["prompt_token_ids"] = sample.token_ids, call.token_ids[place]
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = [_prompt_logprob(position) for position in delta.prompt_logprobs or []]
    return choice


def _logprobs(k: int, sample: SampleDelta, offset: int) -> CompletionLogprobs:
    found: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    _add_logprobs(found, k, sample.logprobs or [], offset)
    return found


def _echoed_logprobs(
    k: int, start: str, prompt: Sequence[TokenLogprobs | None], sample: SampleDelta
) -> CompletionLogprobs:
    found: CompletionLogprobs = {
        "tokens": [start],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [0],
    }
    positions = [position for position in prompt if position is not None]
    offset = _add_logprobs(found, k, positions, len(start))
    _add_logprobs(found, k, sample.logprobs or [], offset)
    return found


def _add_logprobs(found: CompletionLogprobs, k: int, positions: Sequence[TokenLogprobs], offset: int) -> int:
    """Append positions whose text begins at `offset`; returns where the next one begins."""
    for position in positions:
        token_id, logprob = chosen(position)
        text = spelled(token_id, logprob)
        found["tokens"].append(text)
        found["token_logprobs"].append(finite(logprob.logprob))
        best = list(position.items())[: k + 1]
        found["top_logprobs"].append({spelled(other, each): finite(each.logprob) for other, each in best})
        found["text_offset"].append(offset)
        offset += len(text)
    return offset


def _prompt_logprob(position: TokenLogprobs | None) -> dict[str, Any] | None:
    if position is None:
        return None
    return {
        str(token_id): {"logprob": finite(each.logprob), "rank": each.rank, "decoded_token": each.decoded_token}
        for token_id, each in position.items()
    }


async def _events(call: _Call, generations: Sequence[Generation]) -> AsyncGenerator[bytes]:
    body, generated, cached = call.body, 0, 0
    offsets: dict[int, int] = {}
    if body.echo and body.logprobs is None:
        for place, text in enumerate(call.texts):
            for index in range(call.params.n):
                yield event(call.answer([_piece(call, place, SampleDelta(index, text, []), {})]))
    async for place, delta in merged(generations):
        generated += num_generated([delta])
        cached += delta.num_cached_tokens
        choices = [_piece(call, place, sample, offsets) for _, sample in sorted(delta.samples.items())]
        choices = [each for each in choices if each["text"] or each["finish_reason"] or each["logprobs"]]
        if choices:
            yield event(call.answer(choices))
    if body.wants_usage:
        last = call.answer([])
        last["usage"] = usage(call.token_ids, generated, cached)
        yield event(last)


def _piece(call: _Call, place: int, sample: SampleDelta, offsets: dict[int, int]) -> CompletionChoice:
    """A part of a choice; `offsets` remembers where the text of each sample's next part begins."""
    index = place * call.params.n + sample.index
    choice: CompletionChoice = {
        "index": index,
        "text": sample.text,
        "logprobs": None,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
    }
    if call.body.logprobs is not None:
        choice["logprobs"] = _logprobs(call.body.logprobs, sample, offsets.get(index, 0))
        offsets[index] = offsets.get(index, 0) + len(sample.text)
    if call.body.return_token_ids:
        choice["token_ids"] = sample.token_ids
    return choice
