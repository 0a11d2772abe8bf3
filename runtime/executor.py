"""Runs steps on all tensor-parallel ranks: rank 0 here, the others in processes of their own."""

import multiprocessing
import os
import pickle
import signal
import socket
import threading
import weakref
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from porter.runtime.config import EngineConfig
from porter.runtime.cuda_runner import CudaRunner
from porter.runtime.errors import ConfigError, EngineError, MachineError, WorkerError
from porter.runtime.model_runner import Launched, ModelRunner, PromptTargets
from porter.runtime.parallel import destroy_parallel, init_parallel
from porter.runtime.sampling import SamplingMetadata
from porter.runtime.sampling_batch import PlainSampling

_START_TIMEOUT = 300.0
_STOP_TIMEOUT = 5.0


class Worker:
    """One rank in its own process, and the pipe that orders go through."""

    def __init__(self, rank: int, config: EngineConfig, init_method: str) -> None:
        self.rank = rank
        # A process that came from a fork server gets its ranks from there: what they import is imported already
        forked = multiprocessing.get_start_method(allow_none=True) == "forkserver"
        context = multiprocessing.get_context() if forked else multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        args = (rank, replace(config, load_progress=None), init_method, theirs)
        self.process = context.Process(target=worker_main, args=args, name=f"porter-rank-{rank}", daemon=True)
        self.process.start()
        theirs.close()

    def expect(self, message: str, timeout: float | None = None) -> None:
        """Wait for `message`; raises the worker's own error, or WorkerError if it died or said nothing."""
        ready = wait([self.pipe, self.process.sentinel], timeout)
        if not ready:
            raise MachineError(
                f"tensor-parallel rank {self.rank} did not start in {timeout:.0f} s", "try again on a less busy machine"
            )
        try:
            found = self.pipe.recv() if self.pipe.poll(0) else None
        except (EOFError, OSError):
            found = None
        if isinstance(found, EngineError):
            raise found
        if found != message:
            raise self.death(found)

    def death(self, found: object = None) -> WorkerError:
        """The error that says how this worker ended."""
        self.process.join(1.0)
        if self.process.exitcode == -signal.SIGKILL:
            return MachineError(f"tensor-parallel rank {self.rank} failed: it was killed", "is there enough memory?")
        how = found if isinstance(found, str) else f"it ended with exit code {self.process.exitcode}"
        return WorkerError(
            f"tensor-parallel rank {self.rank} failed: {how}",
            "see its output above; a script must start the engine under `if __name__ == '__main__':`",
        )

    def last_words(self) -> EngineError | None:
        """The error that this worker sent, or that it died without one; None while it is well."""
        try:
            if self.pipe.poll(0):
                found = self.pipe.recv()
                return found if isinstance(found, EngineError) else self.death(found)
        except (EOFError, OSError):
            return self.death()
        return None if self.process.is_alive() else self.death()


class Executor:
    """`launch` starts one step on every rank; its result is what rank 0 sampled.

    After a failure of any rank each call raises WorkerError. `shutdown` stops the other processes; it also happens when
    the executor is collected, at interpreter exit, and in the workers themselves when this process dies.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._workers: list[Worker] = []
        self._failure: EngineError | None = None
        self._close = weakref.finalize(self, _stop_workers, self._workers, torch.get_num_threads())
        try:
            if config.tensor_parallel_size > 1:
                self._start_workers()
            self._runner = _make_runner(config)
            for worker in self._workers:
                worker.expect("loaded")
            self.num_blocks = self._allocate()
        except BaseException:
            self._terminate()
            raise

    def launch(
        self,
        buffer: npt.NDArray[np.uint8],
        sampling_metadata: SamplingMetadata | None,
        prompt_targets: PromptTargets | None,
        plain: PlainSampling,
    ) -> Launched:
        """Start the step in `buffer` (see step_input) on all ranks. `sampling_metadata` may be None for a runner that
        `runs_ahead` when `plain` says all."""
        if self.config.tensor_parallel_size == 1:
            return self._runner.launch(buffer, sampling_metadata, prompt_targets, plain)
        self._send(("execute", buffer))
        return Launched(self._guarded(self._runner.execute, buffer, sampling_metadata, prompt_targets))

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the one before it is done."""
        return isinstance(self._runner, CudaRunner)

    @property
    def model(self) -> Any:
        """Rank 0's part of the model."""
        return self._runner.model

    @property
    def kv_caches(self) -> list[torch.Tensor | None]:
        """Rank 0's part of the KV cache, one entry per attention layer; None for decoder layers without attention."""
        return self._runner.kv_caches

    def shutdown(self) -> None:
        """Stop the other ranks; harmless when called twice."""
        self._close()

    def _start_workers(self) -> None:
        config = self.config
        if config.device.type == "cuda" and torch.cuda.device_count() < config.tensor_parallel_size:
            raise ConfigError(
                f"tensor_parallel_size {config.tensor_parallel_size} needs as many GPUs, torch sees "
                f"{torch.cuda.device_count()}",
                "lower tensor_parallel_size",
            )
        init_method = f"tcp://127.0.0.1:{_free_port()}"
        for rank in range(1, config.tensor_parallel_size):
            self._workers.append(Worker(rank, config, init_method))
        for worker in self._workers:
            worker.expect("started", _START_TIMEOUT)
        _join_ranks(0, config, init_method)
        threading.Thread(target=_watch, args=(weakref.ref(self), self._workers), daemon=True).start()

    def _allocate(self) -> int:
        num_blocks = self.config.num_blocks
        if num_blocks is None:
            if self.config.device.type == "cuda":
                self._send(("warm_up",))
                self._guarded(self._runner.warm_up)
            num_blocks = self._runner.num_blocks_in_memory()
        if num_blocks < 1:
            raise ConfigError("no memory is left for the KV cache", "use a smaller model or dtype, or free memory")
        self._send(("allocate", num_blocks))
        self._runner.allocate(num_blocks)
        return num_blocks

    def _send(self, order: tuple[Any, ...]) -> None:
        if self._failure is not None:
            raise self._failure
        if not self._close.alive:
            raise WorkerError("the engine was shut down", "start a new LLM")
        payload = pickle.dumps(order, protocol=pickle.HIGHEST_PROTOCOL)
        for worker in self._workers:
            try:
                worker.pipe.send_bytes(payload)
            except OSError:
                self._fail(worker.last_words() or worker.death())

    def _guarded(self, call: Any, *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:
            # A rank that is gone breaks the collectives of the others; the rank's own words say more
            for worker in self._workers:
                words = worker.last_words()
                if words is not None:
                    self._fail(words)
            self._fail(WorkerError(f"a step failed on rank 0: {error}"))

    def _fail(self, error: EngineError) -> None:
        self._failure = error
        self._terminate()
        raise error

    def _terminate(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        self.shutdown()


def _make_runner(config: EngineConfig) -> ModelRunner:
    on_one_gpu = config.device.type == "cuda" and config.tensor_parallel_size == 1
    return CudaRunner(config) if on_one_gpu else ModelRunner(config)


def worker_main(rank: int, config: EngineConfig, init_method: str, pipe: Connection) -> None:
    """Body of a worker process: follow orders until told to stop or until rank 0 is gone."""
    try:
        pipe.send("started")
        _join_ranks(rank, config, init_method)
        runner = ModelRunner(replace(config, device=_rank_device(rank, config)))
        pipe.send("loaded")
        while True:
            order, *args = pickle.loads(pipe.recv_bytes())
            if order == "stop":
                break
            getattr(runner, order)(*args)
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        os._exit(0)
    except Exception as error:
        _say(pipe, error if isinstance(error, EngineError) else f"{type(error).__name__}: {error}")
        # Not a clean exit: leaving the group would wait for ranks that wait for this one
        os._exit(1)
    os._exit(0)


def _say(pipe: Connection, words: object) -> None:
    try:
        pipe.send(words)
    except OSError:
        return


def _rank_device(rank: int, config: EngineConfig) -> torch.device:
    return torch.device("cuda", rank) if config.device.type == "cuda" else config.device


def _join_ranks(rank: int, config: EngineConfig, init_method: str) -> None:
    size = config.tensor_parallel_size
    if config.device.type == "cuda":
        torch.cuda.set_device(rank)
        init_parallel(rank, size, init_method, "nccl")
        return
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    init_parallel(rank, size, init_method, "gloo")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _watch(executor: "weakref.ref[Executor]", workers: list[Worker]) -> None:
    """With NCCL a lost rank would leave rank 0 waiting for ever: break its collectives instead."""
    ended = wait([worker.process.sentinel for worker in workers])
    alive = executor()
    if ended and alive is not None and alive._close.alive and alive.config.device.type == "cuda":
        torch.distributed.distributed_c10d._abort_process_group()


def _stop_workers(workers: list[Worker], num_threads: int) -> None:
    for worker in workers:
        try:
            worker.pipe.send_bytes(pickle.dumps(("stop",)))
        except OSError:
            continue
    for worker in workers:
        worker.process.join(_STOP_TIMEOUT)
        if worker.process.is_alive():
            worker.process.terminate()
            worker.process.join(_STOP_TIMEOUT)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.pipe.close()
    if workers:
        workers.clear()
        destroy_parallel()
        torch.set_num_threads(num_threads)
