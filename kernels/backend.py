"""Whether Triton runs here: on a GPU or in its interpreter. Where neither is, no kernel is compiled or imported."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _load() -> tuple[Any, Any]:
    if INTERPRETED or torch.cuda.is_available():
        try:
            import triton
            import triton.language
        except ImportError:
            pass
        else:
            return triton, triton.language

    def jit(function: Callable[..., object] | None = None, **options: object) -> object:
        return (lambda decorated: decorated) if function is None else function

    return SimpleNamespace(jit=jit), SimpleNamespace(constexpr=lambda value: value)


triton, tl = _load()
HAS_TRITON = hasattr(triton, "__version__")


_interpreting = False


@contextmanager
def interpreting() -> Iterator[None]:
    """Run the kernels on CPU tensors too, in Triton's interpreter: for tests of what a GPU would do."""
    global _interpreting
    _interpreting = INTERPRETED
    try:
        yield
    finally:
        _interpreting = False


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether a launcher should run its Triton kernel for `tensor`."""
    return HAS_TRITON and (tensor.is_cuda or _interpreting)


@cache
def _has_dependent_launch(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def dependent_launch(tensor: torch.Tensor) -> dict[str, bool]:
    """Launch options for a kernel with a constexpr PDL that may start before the one before it on the stream has ended.

    Such a kernel calls gdc_wait before it reads what others computed and before it writes; until then it may read
    weights. (Programmatic dependent launch, CUDA programming guide; Hopper and later.)
    """
    if tensor.is_cuda and _has_dependent_launch(tensor.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
