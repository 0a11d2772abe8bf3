"""Keeps memory to what is needed at a time: recorded outputs go to disk, what is done with goes back to the system."""

import ctypes
import gc
import mmap
import sys
import tempfile

import torch

_CHUNK = 2**30  # bytes of a file; a sparse one, so that only what is written takes space
_ALIGNED = 64
_LOOSE = 2**26  # bytes written before they are left to the disk's cache


class Spool:
    """Keeps tensors in temporary files, mapped into memory: the system may write them out and take their pages back.

    The files have no name, and go when the tensors and the spool do.
    """

    def __init__(self) -> None:
        self._map: mmap.mmap
        self._end = self._size = self._settled = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` on disk."""
        if not tensor.numel():
            return tensor.clone()
        size = tensor.numel() * tensor.element_size()
        if self._end + size > self._size:
            self._grow(size)
        start, self._end = self._end, self._end + -(-size // _ALIGNED) * _ALIGNED
        kept = torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=start)
        kept = kept.view(tensor.shape).copy_(tensor)
        if self._end - self._settled > _LOOSE:
            self._settle()
        return kept

    def _settle(self) -> None:
        """Take the pages out of this process; they come back from the file where they are read."""
        self._settled = self._end
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _grow(self, size: int) -> None:
        if self._size:
            self._settle()
        self._size, self._end, self._settled = max(_CHUNK, size), 0, 0
        with tempfile.TemporaryFile() as file:
            file.truncate(self._size)
            self._map = mmap.mmap(file.fileno(), self._size)


def give_back() -> None:
    """Free what nothing refers to any more, cycles included, and return it to the system where libc can."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
