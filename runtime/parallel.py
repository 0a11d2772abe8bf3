"""Tensor parallelism: the rank, the size and the two collectives; the only importer of torch.distributed."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from porter.runtime.errors import ConfigError

T = TypeVar("T")


class Group(Protocol):
    """The ranks that share one model."""

    rank: int
    size: int

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; same shape."""

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor of each rank, in rank order; equal shapes."""


class _SingleGroup:
    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor]


class _ProcessGroup:
    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        result = tensor.contiguous()
        dist.all_reduce(result)
        return result

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        import torch.distributed as dist

        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return parts


class _ThreadGroup:
    """Ranks as threads of one process: shards can be built and checked without starting processes."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, mailbox: list[torch.Tensor | None]) -> None:
        self.rank = rank
        self.size = size
        self._barrier = barrier
        self._mailbox = mailbox

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._mailbox[self.rank] = tensor
        self._barrier.wait()
        parts = [part for part in self._mailbox if part is not None]
        # A rank may only overwrite its slot once all ranks have read it.
        self._barrier.wait()
        return parts

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.all_gather(tensor)).sum(0)


_group: Group = _SingleGroup()
_thread = threading.local()


def _current() -> Group:
    group: Group = getattr(_thread, "group", None) or _group
    return group


def get_tp_rank() -> int:
    """This process's tensor-parallel rank; 0 without parallelism."""
    return _current().rank


def get_tp_size() -> int:
    """The number of tensor-parallel ranks; 1 without parallelism."""
    return _current().size


def init_parallel(rank: int, size: int, init_method: str = "env://", backend: str = "gloo") -> None:
    """Join `size` processes into one tensor-parallel group.

    init_method and backend are torch.distributed's. size 1 starts nothing. Raises ConfigError for a bad rank.
    """
    global _group
    if not 0 <= rank < size:
        raise ConfigError(f"tensor-parallel rank {rank} does not exist", f"ranks run from 0 to {size - 1}")
    if size == 1:
        _group = _SingleGroup()
        return
    import torch.distributed as dist

    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=size)
    _group = _ProcessGroup(rank, size)


def destroy_parallel() -> None:
    """Leave the group and return to a single rank; harmless when there is none."""
    global _group
    if isinstance(_group, _ProcessGroup):
        import torch.distributed as dist

        dist.destroy_process_group()
    _group = _SingleGroup()


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over ranks, same shape; may reuse its memory."""
    return _current().all_reduce(tensor)


def all_gather(tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """The ranks' tensors joined along `dim`, in rank order; shapes must be equal."""
    group = _current()
    return tensor if group.size == 1 else torch.cat(group.all_gather(tensor), dim=dim)


def run_ranks(size: int, work: Callable[[int], T]) -> list[T]:
    """`work(rank)` of every rank, each on a thread of this process with working collectives.

    For checking shards without processes. Raises the error of the first rank that failed.
    """
    barrier = threading.Barrier(size)
    mailbox: list[torch.Tensor | None] = [None] * size
    results: dict[int, T] = {}
    failures: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        _thread.group = _ThreadGroup(rank, size, barrier, mailbox)
        try:
            results[rank] = work(rank)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            failures[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[min(failures)]
    return [results[rank] for rank in range(size)]


@contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """Build what `rank` of `size` would hold, without the others: no collective may be called."""
    before = getattr(_thread, "group", None)
    _thread.group = _ThreadGroup(rank, size, threading.Barrier(size), [None] * size)
    try:
        yield
    finally:
        _thread.group = before


def divide(total: int, size: int, what: str) -> int:
    """total / size; raises ConfigError, naming `what`, unless it divides."""
    if total % size:
        raise ConfigError(f"{what} = {total} does not divide by tp_size = {size}", "choose a tp_size that divides it")
    return total // size
