"""Body of the engine process: takes orders, steps, reports."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from multiprocessing.connection import wait
from typing import Any

import zmq

from porter.runtime.engine import LLM
from porter.runtime.errors import EngineError, RequestError
from porter.runtime.llm_engine import LLMEngine
from porter.runtime.model_registry import ModelRegistry
from porter.runtime.outputs import CompletionOutput, RequestOutput
from porter.serve.messages import (
    Abort,
    EngineFacts,
    EngineStats,
    Failed,
    Rejected,
    Report,
    RequestDelta,
    SampleDelta,
    Stop,
    Submit,
    decode,
    encode,
)


def engine_main(endpoint: str, options: Mapping[str, Any], registered: Mapping[str, str]) -> None:
    """Serve orders from `endpoint` until told to stop; the process ends at once when its parent is gone."""
    # A signal to the whole group is the parent's to handle: it lets open requests finish. The other ranks inherit an
    # ignored SIGINT, which is right; SIGTERM has a handler instead, so that they can still be terminated.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(endpoint)
    code = _serve(socket, options, registered)
    socket.close(linger=2000)
    context.term()
    sys.exit(code)


def _serve(socket: "zmq.Socket[bytes]", options: Mapping[str, Any], registered: Mapping[str, str]) -> int:
    llm = None
    try:
        for architecture, reference in registered.items():
            ModelRegistry.register_model(architecture, reference)
        llm = LLM(**options)
        socket.send(encode(_facts(llm.llm_engine)))
        EngineLoop(llm.llm_engine, socket).run()
    except Exception as error:
        if not isinstance(error, EngineError):
            traceback.print_exc()
        socket.send(encode(Failed(error if isinstance(error, EngineError) else f"{type(error).__name__}: {error}")))
        return 1
    finally:
        if llm is not None:
            llm.shutdown()
    return 0


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _facts(engine: LLMEngine) -> EngineFacts:
    config = engine.config
    return EngineFacts(
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        num_blocks=engine.block_manager.num_blocks,
        block_size=config.block_size,
        vocab_size=engine.vocab_size,
        device=str(config.device),
        dtype=str(config.dtype).removeprefix("torch."),
    )


class EngineLoop:
    """Steps the engine while it has work, and takes all orders that came in between steps."""

    def __init__(self, engine: LLMEngine, socket: "zmq.Socket[bytes]") -> None:
        self._engine = engine
        self._socket = socket
        self._finished: dict[str, set[int]] = {}  # open requests with more than one sample: those told as finished
        self._running = True

    def run(self) -> None:
        """Serve until a Stop."""
        while self._running:
            changed = self._take_orders()
            outputs = self._engine.step() if self._engine.has_unfinished_requests() else []
            if outputs or changed:
                self._socket.send(encode(Report([self._delta(output) for output in outputs], self._stats())))

    def _take_orders(self) -> bool:
        """Carry out what was ordered, waiting for an order if there is nothing else to do; whether there was any."""
        taken = False
        while True:
            idle = not self._engine.has_unfinished_requests() and self._running and not taken
            if not self._socket.poll(None if idle else 0):
                return taken
            self._carry_out(decode(self._socket.recv()))
            taken = True

    def _carry_out(self, order: object) -> None:
        if isinstance(order, Submit):
            try:
                self._engine.add_request(order.request_id, order.prompt_token_ids, order.params)
            except RequestError as error:
                self._socket.send(encode(Rejected(order.request_id, str(error))))
        elif isinstance(order, Abort):
            self._engine.abort_request(order.request_id)
            self._finished.pop(order.request_id, None)
        elif isinstance(order, Stop):
            self._running = False

    def _stats(self) -> EngineStats:
        scheduler = self._engine.scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_free_blocks=self._engine.block_manager.num_free_blocks,
            num_preemptions=scheduler.num_preemptions,
        )

    def _delta(self, output: RequestOutput) -> RequestDelta:
        new = [sample for sample in output.outputs if self._is_new(output, sample)]
        delta = RequestDelta(
            output.request_id, {sample.index: _sample_delta(sample) for sample in new}, output.finished
        )
        if output.metrics is not None:
            delta.first_token_time = output.metrics.first_token_time
        if output.finished:
            self._finished.pop(output.request_id, None)
            delta.prompt_logprobs = output.prompt_logprobs
            delta.num_cached_tokens = output.num_cached_tokens
        return delta

    def _is_new(self, output: RequestOutput, sample: CompletionOutput) -> bool:
        """Whether a sample has anything to tell: each step renders all samples of a request, the finished ones too."""
        if len(output.outputs) == 1 or sample.finish_reason is None:
            return bool(sample.token_ids) or sample.finish_reason is not None
        told = self._finished.setdefault(output.request_id, set())
        is_new = sample.index not in told
        told.add(sample.index)
        return is_new


def _sample_delta(sample: CompletionOutput) -> SampleDelta:
    return SampleDelta(
        sample.index, sample.text, sample.token_ids, sample.logprobs, sample.finish_reason, sample.stop_reason
    )
