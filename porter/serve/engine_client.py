"""The engine as the HTTP process sees it: submit a prompt, read what comes, abort; and start it again if it dies."""

import asyncio
import math
import multiprocessing
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from porter.runtime.errors import EngineError, WorkerError
from porter.runtime.sampling import SamplingParams
from porter.serve.messages import (
    PROCESS_PREFIX,
    Abort,
    EngineFacts,
    EngineStats,
    Failed,
    Rejected,
    Report,
    RequestDelta,
    Stop,
    Submit,
    decode,
    encode,
)
from porter.serve.metrics import Metrics
from porter.serve.options import ServeOptions

_STOP_TIMEOUT = 10.0
_RESTART_WINDOW = 600.0
_LAST_WORDS_TIMEOUT = 0.5
_RATE_WINDOW = 64


class QueueFull(Exception):
    """No more samples are taken now; `retry_after` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the server's queue is full")
        self.retry_after = retry_after


class EngineUnavailable(Exception):
    """The engine takes nothing: it is starting again, or the server is shutting down."""


class EngineDied(Exception):
    """The engine ended while it worked on a request."""


class RequestRejected(Exception):
    """The engine can't serve a request."""


class Generation:
    """What comes of one prompt: iterate for what is new; what was not yet read is merged, so a slow reader costs
    no more memory than the whole answer."""

    def __init__(self, request_id: str, num_samples: int) -> None:
        self.request_id = request_id
        self.num_samples = num_samples
        self.arrival_time = time.monotonic()
        self.last_time: float | None = None
        self.finished = False
        self._pending: RequestDelta | None = None
        self._failure: Exception | None = None
        self._news = asyncio.Event()

    def put(self, delta: RequestDelta) -> None:
        """Add what a step brought."""
        if self._pending is None:
            self._pending = delta
        else:
            self._pending.merge(delta)
        self.finished = delta.finished
        self._news.set()

    def fail(self, failure: Exception) -> None:
        """Make the reader's next call raise."""
        self._failure = failure
        self.finished = True
        self._news.set()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> RequestDelta:
        if self.finished and self._pending is None and self._failure is None:
            raise StopAsyncIteration
        await self._news.wait()
        self._news.clear()
        if self._failure is not None:
            raise self._failure
        assert self._pending is not None
        delta, self._pending = self._pending, None
        return delta


class EngineClient:
    """Owns the engine process.

    `start` returns when the model is loaded, or raises the engine's own EngineError. When the process dies later, every
    open generation raises EngineDied, and it is started again; `broken` is set when that was tried too often.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.metrics = Metrics()
        self.facts: EngineFacts | None = None
        self.stats = EngineStats()
        self.ready = False
        self.draining = False
        self.num_restarts = 0
        self.broken = asyncio.Event()
        self.metrics.watch(lambda: self.stats, lambda: self.facts)
        self._open: dict[str, Generation] = {}
        self._num_samples = 0
        self._next_id = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._finish_times: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._process: BaseProcess | None = None
        self._ended: asyncio.Future[None]
        self._folder = Path(tempfile.mkdtemp(prefix="porter-serve-"))  # only its owner may open a socket in it
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> EngineFacts:
        """Start the process and wait until it has loaded the model."""
        facts = await self._launch()
        self._supervisor = asyncio.create_task(self._supervise())
        return facts

    def submit(self, prompt_token_ids: list[int], params: SamplingParams) -> Generation:
        """Queue a prompt; QueueFull or EngineUnavailable if it can't be taken now."""
        self.admit(params.n)
        request_id = str(self._next_id)
        self._next_id += 1
        generation = self._open[request_id] = Generation(request_id, params.n)
        self._num_samples += params.n
        self._idle.clear()
        self.metrics.prompt_tokens.inc(len(prompt_token_ids))
        self._send(Submit(request_id, prompt_token_ids, params))
        return generation

    def admit(self, num_samples: int) -> None:
        """Raise QueueFull or EngineUnavailable unless so many samples could be taken now."""
        if self.draining:
            raise EngineUnavailable("the server is shutting down")
        if not self.ready:
            raise EngineUnavailable("the engine is starting again")
        if self._num_samples + num_samples > self.capacity:
            self.metrics.rejected.inc()
            raise QueueFull(self._retry_after())

    @property
    def capacity(self) -> int:
        """Samples that may run or wait at a time."""
        assert self.facts is not None
        return self.facts.max_num_seqs + self.options.max_queued_requests

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._open)

    def abort(self, generations: Sequence[Generation]) -> None:
        """Forget generations; those that are finished are left alone."""
        for generation in generations:
            if self._open.get(generation.request_id) is generation:
                self._forget(generation)
                self.metrics.aborted.inc()
                if self.ready:
                    self._send(Abort(generation.request_id))

    async def drain(self, timeout: float) -> bool:
        """Take nothing new and wait for what is open; what is left after `timeout` seconds fails. Whether none was."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            for generation in self._open.values():
                self._send(Abort(generation.request_id))
            self._fail_open(EngineUnavailable("the server is shutting down"))
            return False
        return True

    async def stop(self) -> None:
        """End the process; harmless when called twice or before `start`."""
        self.draining = True
        if self._supervisor is not None:
            self._supervisor.cancel()
        if self._socket is not None and self.ready:
            self._send(Stop())
        self.ready = False
        if self._process is not None:
            await asyncio.to_thread(_join, self._process)
        self._close_socket()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _launch(self) -> EngineFacts:
        endpoint = f"ipc://{self._folder}/engine-{self.num_restarts}"
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(endpoint)
        arguments = (endpoint, self.options.engine, self.options.registered)
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_engine_main, args=arguments, name=f"{PROCESS_PREFIX}engine")
        self._process.start()
        self._ended = _end_of(self._process)
        message = await self._receive()
        if not isinstance(message, EngineFacts):
            error = message.error if isinstance(message, Failed) else message
            raise error if isinstance(error, EngineError) else WorkerError(f"the engine did not start: {error}")
        self.facts, self.stats = message, EngineStats(num_free_blocks=message.num_blocks)
        self.ready = True
        return message

    async def _receive(self) -> object:
        """The next message; a Failed when the process has ended and nothing is left to read."""
        assert self._socket is not None
        assert self._process is not None
        message = asyncio.ensure_future(self._socket.recv())
        either: tuple[asyncio.Future[Any], ...] = (message, self._ended)
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not message.done():
            await asyncio.wait({message}, timeout=_LAST_WORDS_TIMEOUT)
        if message.done():
            return decode(message.result())
        message.cancel()
        return Failed(f"it ended with exit code {self._process.exitcode}")

    async def _supervise(self) -> None:
        starts: deque[float] = deque()
        while True:
            failure = await self._hand_out()
            self.ready = False
            _say(f"the engine failed: {failure}")
            self._fail_open(EngineDied("the engine failed while it worked on this request"))
            starts.append(time.monotonic())
            while starts[0] < starts[-1] - _RESTART_WINDOW:
                starts.popleft()
            if len(starts) > self.options.max_restarts or not await self._restart():
                self.broken.set()
                return

    async def _hand_out(self) -> object:
        """Give reports to those who wait for them until the engine ends; returns how it ended."""
        while True:
            message = await self._receive()
            if isinstance(message, Failed):
                return message.error
            if isinstance(message, Report):
                self._take(message)
            elif isinstance(message, Rejected) and message.request_id in self._open:
                generation = self._open[message.request_id]
                self._forget(generation)
                generation.fail(RequestRejected(message.message))

    def _take(self, report: Report) -> None:
        self.stats = report.stats
        for delta in report.deltas:
            generation = self._open.get(delta.request_id)
            if generation is None:
                continue  # aborted while this was under way
            generation.last_time = self.metrics.on_delta(delta, generation.arrival_time, generation.last_time)
            generation.put(delta)
            if delta.finished:
                self._finish_times.append(time.monotonic())
                self._forget(generation)
        self.metrics.on_stats(report.stats)

    async def _restart(self) -> bool:
        assert self._process is not None
        await asyncio.to_thread(_join, self._process)
        self._close_socket()
        self.num_restarts += 1
        self.metrics.restarts.inc()
        _say("starting the engine again")
        try:
            await self._launch()
        except EngineError as error:
            _say(f"the engine can't be started again: {error}")
            return False
        return True

    def _fail_open(self, failure: Exception) -> None:
        for generation in list(self._open.values()):
            self._forget(generation)
            generation.fail(failure)

    def _forget(self, generation: Generation) -> None:
        del self._open[generation.request_id]
        self._num_samples -= generation.num_samples
        generation.finished = True
        if not self._open:
            self._idle.set()

    def _retry_after(self) -> int:
        """Seconds in which a place should be free, from how fast requests have been finishing; 1 to 60."""
        if len(self._finish_times) < 2:
            return 1
        pace = (time.monotonic() - self._finish_times[0]) / len(self._finish_times)
        return max(1, min(60, math.ceil(pace)))

    def _send(self, order: object) -> None:
        assert self._socket is not None
        self._socket.send(encode(order))  # without a high-water mark it never waits

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None


def _engine_main(*arguments: Any) -> None:
    from porter.serve.engine_process import engine_main

    engine_main(*arguments)


def _end_of(process: BaseProcess) -> "asyncio.Future[None]":
    """Done when the process has ended."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        loop.remove_reader(process.sentinel)
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(process.sentinel, end)
    return ended


def _join(process: BaseProcess) -> None:
    process.join(_STOP_TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()


def _say(message: str) -> None:
    from porter import console

    console.say(message)
