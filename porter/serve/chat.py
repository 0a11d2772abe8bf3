"""`POST /v1/chat/completions`."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from porter.runtime.outputs import TokenLogprobs
from porter.serve.answers import (
    ChatAnswer,
    ChatChoice,
    ChatLogprobs,
    TopLogprob,
    chosen,
    finite,
    now,
    num_generated,
    spelled,
    usage,
)
from porter.serve.engine_client import Generation
from porter.serve.messages import RequestDelta, SampleDelta
from porter.serve.protocol import ChatRequest
from porter.serve.sampling import check_length, check_logprobs, sampling_params
from porter.serve.service import Service, merged
from porter.serve.streaming import EventStream, event, while_connected


@dataclass
class _Call:
    """One request under way."""

    body: ChatRequest
    id: str
    model: str
    prompt: list[int]
    created: int = field(default_factory=now)

    def answer(self, choices: list[ChatChoice], *, streamed: bool = False) -> ChatAnswer:
        return {
            "id": self.id,
            "object": "chat.completion.chunk" if streamed else "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


async def create_chat(service: Service, body: ChatRequest, request: Request, request_id: str) -> Response:
    """Answer one request."""
    model = service.check_model(body.model)
    check_logprobs(body.top_logprobs, service.options.max_logprobs, "top_logprobs")
    prompt = await service.tokenizing.encode_chat(body)
    asked = body.max_completion_tokens or body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = sampling_params(body, service.defaults, asked, logprobs=logprobs)
    check_length(prompt, params, service.facts, asked)
    call = _Call(body, f"chatcmpl-{request_id}", model, prompt)
    generations = service.submit([prompt], params)
    if body.stream:
        return EventStream(_events(call, generations, params.n), lambda: service.client.abort(generations))
    deltas = await while_connected(request.receive, service.collect(generations))
    return JSONResponse(_whole(call, deltas[0]))


def _whole(call: _Call, delta: RequestDelta) -> ChatAnswer:
    choices = []
    for _, sample in sorted(delta.samples.items()):
        choice = _choice(call, sample)
        choice["message"] = {"role": "assistant", "content": sample.text}
        choices.append(choice)
    answer = call.answer(choices)
    answer["usage"] = usage([call.prompt], num_generated([delta]), delta.num_cached_tokens)
    return answer


async def _events(call: _Call, generations: Sequence[Generation], n: int) -> AsyncGenerator[bytes]:
    generated = cached = 0
    started: set[int] = set()
    async for _, delta in merged(generations):
        generated += num_generated([delta])
        cached = delta.num_cached_tokens
        for index, sample in sorted(delta.samples.items()):
            if index not in started:
                started.add(index)
                yield event(call.answer([_first(index)], streamed=True))
            if sample.text or sample.finish_reason or sample.logprobs:
                choice = _choice(call, sample)
                choice["delta"] = {"content": sample.text} if sample.text else {}
                yield event(call.answer([choice], streamed=True))
    if call.body.wants_usage:
        last = call.answer([], streamed=True)
        last["usage"] = usage([call.prompt], generated, cached)
        yield event(last)


def _first(index: int) -> ChatChoice:
    return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


def _choice(call: _Call, sample: SampleDelta) -> ChatChoice:
    choice: ChatChoice = {
        "index": sample.index,
        "logprobs": _logprobs(sample.logprobs, call.body.top_logprobs or 0) if call.body.logprobs else None,
        "finish_reason": sample.finish_reason,
    }
    if sample.finish_reason is not None:
        choice["stop_reason"] = sample.stop_reason
    if call.body.return_token_ids:
        choice["token_ids"] = sample.token_ids
    return choice


def _logprobs(positions: Sequence[TokenLogprobs] | None, k: int) -> ChatLogprobs:
    content = []
    for position in positions or []:
        token_id, logprob = chosen(position)
        best = sorted(position.items(), key=lambda item: item[1].rank)[:k]
        top = [_top(spelled(other, each), each.logprob) for other, each in best]
        content.append({**_top(spelled(token_id, logprob), logprob.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}  # type: ignore[typeddict-item]


def _top(token: str, logprob: float) -> TopLogprob:
    return {"token": token, "logprob": finite(logprob), "bytes": list(token.encode())}
