"""Results that are computed when they are first used: who uses them may compute more in the same kernel.

A layer returns a Deferred on a GPU where a known user of its result can do the work better: RMSNorm and torch's
layer_norm add and normalise in one pass over memory, attention normalises heads while it loads them, an activation
joins the linear before it. Any other use, be it an operation, a method or a property with data, computes the plain
result first. Nothing in a port needs to know.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from porter.kernels.backend import use_triton
from porter.kernels.layer_norm import add_layer_norm
from porter.runtime.errors import EngineError

_PROPERTIES: Any = [getattr(torch.Tensor, name) for name in ("shape", "dtype", "device", "is_cuda", "is_cpu", "ndim")]
_ABOUT = {
    *(each.__get__ for each in _PROPERTIES),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
}
_ADDITIONS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}


class Deferred(torch.Tensor):
    """A tensor of `shape` and the dtype of its inputs, whose data come from `compute` on first use.

    Its inputs must not be changed in place before that: it is noticed, and an error.
    """

    _value: torch.Tensor | None

    @classmethod
    def like(cls, x: torch.Tensor, shape: tuple[int, ...]) -> Self:
        """A result of that shape, with x's dtype and device: for `__new__`."""
        made: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=x.dtype, device=x.device)
        return made

    def __init__(self, *inputs: torch.Tensor) -> None:
        self._value = None
        self._inputs = tuple((x, x._version) for x in inputs if not isinstance(x, Deferred))

    @property
    def is_pending(self) -> bool:
        """Whether nothing has used it yet."""
        return self._value is None

    def compute(self) -> torch.Tensor:
        """The plain result."""
        raise NotImplementedError

    def value(self) -> torch.Tensor:
        """The plain result, computed once."""
        if self._value is None:
            self.check_inputs()
            self._settle(self.compute())
        assert self._value is not None
        return self._value

    def _settle(self, value: torch.Tensor) -> None:
        """Take over the result, and let go of what it was made from."""
        self.__dict__.clear()
        self._value = value

    def check_inputs(self) -> None:
        """Raises EngineError if an input was changed since."""
        if any(x._version != version for x, version in self._inputs):
            raise EngineError(
                "the port changes a tensor in place that a deferred result still needs",
                "write that operation out of place in the port",
            )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _ADDITIONS and len(args) == 2 and not kwargs and _are_alike(*args):
            return Sum(*args)
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs or {}))
        return func(*args, **kwargs)


class Sum(Deferred):
    """x + residual `[T, hidden]`."""

    def __new__(cls, x: torch.Tensor, residual: torch.Tensor) -> Self:
        return cls.like(x, tuple(x.shape))

    def __init__(self, x: torch.Tensor, residual: torch.Tensor) -> None:
        super().__init__(x, residual)
        self.terms = (x, residual)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.layer_norm and isinstance(args[0], Sum) and args[0].is_pending:
            found = args[0]._layer_norm(*args[1:], **(kwargs or {}))
            if found is not None:
                return found
        return super().__torch_function__(func, types, args, kwargs)

    def _layer_norm(
        self, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> torch.Tensor | None:
        if tuple(shape) != tuple(self.shape[-1:]):
            return None
        return self.apart(lambda x, residual: add_layer_norm(x, residual, weight, bias, eps))

    def compute(self) -> torch.Tensor:
        x, residual = (materialize(term) for term in self.terms)
        return x + residual

    def apart(self, fused: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """fused(x, residual) -> (result, x + residual), whose sum becomes this one's value; returns the result."""
        self.check_inputs()
        x, residual = (materialize(term) for term in self.terms)
        result, value = fused(x, residual)
        self._settle(value)
        return result


def _are_alike(x: Any, y: Any) -> bool:
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
        return False
    return x.dim() == 2 and x.shape == y.shape and x.dtype == y.dtype and x.device == y.device


def materialize(x: torch.Tensor) -> torch.Tensor:
    """x with data."""
    return x.value() if isinstance(x, Deferred) else x


def can_defer(x: torch.Tensor) -> bool:
    """Whether results of x may be deferred: on a GPU, without gradients, where changes in place are counted."""
    return use_triton(x) and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
