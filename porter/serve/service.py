"""What all endpoints share: the engine, the tokenizer, and the way from token ids to answers."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from porter.runtime.sampling import SamplingParams
from porter.serve.engine_client import EngineClient, Generation
from porter.serve.errors import ApiError
from porter.serve.messages import EngineFacts, RequestDelta
from porter.serve.options import ServeOptions
from porter.serve.tokenizing import Tokenizing


@dataclass(frozen=True)
class Service:
    """A running engine and what is known about its model; `defaults` are sampling settings that a request may omit."""

    options: ServeOptions
    client: EngineClient
    facts: EngineFacts
    tokenizing: Tokenizing
    model_names: tuple[str, ...]
    defaults: dict[str, Any]
    created: int

    def check_model(self, name: str | None) -> str:
        """The name to answer with; ApiError for a model that is not served."""
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            message = f"the model {name!r} does not exist; this server has {', '.join(self.model_names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def submit(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Generation]:
        """Queue all prompts or none."""
        wanted = len(prompts) * params.n
        if wanted > self.client.capacity:
            raise ApiError(400, f"{wanted} samples are more than the {self.client.capacity} that this server holds")
        self.client.admit(wanted)
        return [self.client.submit(prompt, params) for prompt in prompts]

    async def collect(self, generations: Sequence[Generation]) -> list[RequestDelta]:
        """Each prompt's whole answer; all are aborted if this is cut off."""
        try:
            return [await _whole(generation) for generation in generations]
        finally:
            self.client.abort(generations)


async def merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, RequestDelta]]:
    """What is new of any of the prompts, with the prompt's place, as it comes."""
    if len(generations) == 1:
        async for delta in generations[0]:
            yield 0, delta
        return
    waiting = {asyncio.ensure_future(anext(each)): place for place, each in enumerate(generations)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place = waiting.pop(task)
                delta = task.result()
                if not delta.finished:
                    waiting[asyncio.ensure_future(anext(generations[place]))] = place
                yield place, delta
    finally:
        for task in waiting:
            task.cancel()


async def _whole(generation: Generation) -> RequestDelta:
    whole: RequestDelta | None = None
    async for delta in generation:
        if whole is None:
            whole = delta
        else:
            whole.merge(delta)
    assert whole is not None
    return whole
