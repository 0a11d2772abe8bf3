"""Records what goes into and comes out of each module during a run, flat over tokens."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]
Keep = Callable[[torch.Tensor], torch.Tensor]  # a copy that nothing else changes


@dataclass(frozen=True)
class Call:
    """One call of a module: its inputs over tokens by name, and its tensors out, each `[num_tokens, features]`."""

    module: str
    inputs: Inputs
    outputs: tuple[torch.Tensor, ...]


@dataclass
class Trace:
    """Calls in the order in which they returned: children before their parent."""

    num_tokens: int
    calls: list[Call] = field(default_factory=list)

    def by_module(self) -> dict[str, list[Call]]:
        """The calls of each module, first to last."""
        grouped: dict[str, list[Call]] = {}
        for call in self.calls:
            grouped.setdefault(call.module, []).append(call)
        return grouped

    def keyed(self) -> list[tuple[tuple[str, int], Call]]:
        """Each call with its module and its index among that module's calls, in execution order."""
        seen: dict[str, int] = {}
        pairs = []
        for call in self.calls:
            index = seen.get(call.module, 0)
            seen[call.module] = index + 1
            pairs.append(((call.module, index), call))
        return pairs


@contextmanager
def recording(model: nn.Module, num_tokens: int, keep: Keep = torch.clone) -> Iterator[Trace]:
    """Record every call of every named module of `model`; `num_tokens` is how many tokens a run has.

    `keep` copies a tensor to where the trace is kept: in memory, or a `Spool`.
    """
    trace = Trace(num_tokens)
    handles = [
        module.register_forward_hook(_hook(trace, name, keep), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def join(traces: list[Trace], order: torch.Tensor | None = None, keep: Keep = torch.clone) -> Trace:
    """One trace of runs on different tokens, joined over tokens; calls that not all runs made are left out.

    `order` are the rows of the joined tensors to keep, in the order to keep them in; `keep` copies them there.
    """
    if len(traces) == 1:
        return traces[0]
    others = [trace.by_module() for trace in traces]
    calls = []
    for (module, index), call in traces[0].keyed():
        same = [runs[module][index] for runs in others if index < len(runs.get(module, ()))]
        if len(same) == len(traces) and all(len(part.outputs) == len(call.outputs) for part in same):
            calls.append(_join_calls(same, order, keep))
    return Trace(sum(trace.num_tokens for trace in traces), calls)


def flatten(value: Any, num_tokens: int, keep: Keep = torch.clone) -> tuple[torch.Tensor, ...]:
    """Copies of the tensors in a module's output that have a token axis, each as `[num_tokens, features]`."""
    if isinstance(value, torch.Tensor):
        flat = _token_first(value, num_tokens)
        return () if flat is None else (keep(flat.detach()),)
    if isinstance(value, dict):
        value = tuple(value.values())
    parts = value if isinstance(value, (tuple, list)) else ()
    return tuple(tensor for part in parts for tensor in flatten(part, num_tokens, keep))


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that `module.forward` gives them."""
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    except TypeError:
        return dict(kwargs)
    return dict(bound.arguments)


def _hook(trace: Trace, name: str, keep: Keep) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        arguments = bound_arguments(module, args, kwargs)
        given = ((key, _tensor_input(value, trace.num_tokens, keep)) for key, value in arguments.items())
        inputs = {key: flat[0] for key, flat in given if flat}
        trace.calls.append(Call(name, inputs, flatten(output, trace.num_tokens, keep)))

    return hook


def _tensor_input(value: Any, num_tokens: int, keep: Keep) -> tuple[torch.Tensor, ...]:
    return flatten(value, num_tokens, keep) if isinstance(value, torch.Tensor) else ()


def _token_first(tensor: torch.Tensor, num_tokens: int) -> torch.Tensor | None:
    axes = [axis for axis, size in enumerate(tensor.shape) if size == num_tokens]
    if len(axes) > 1:
        return None  # attention weights
    if tensor.ndim and tensor.shape[0] % num_tokens == 0:
        return tensor.reshape(num_tokens, -1)
    return tensor.movedim(axes[0], 0).reshape(num_tokens, -1) if axes else None


def _join_calls(calls: list[Call], order: torch.Tensor | None, keep: Keep) -> Call:
    shared = [name for name in calls[0].inputs if all(name in call.inputs for call in calls)]
    rows = slice(None) if order is None else order
    inputs = {n: keep(torch.cat([call.inputs[n] for call in calls])[rows]) for n in shared if _same_width(n, calls)}
    outputs = zip(*(call.outputs for call in calls), strict=True)
    return Call(calls[0].module, inputs, tuple(keep(torch.cat(parts)[rows]) for parts in outputs))


def _same_width(name: str, calls: list[Call]) -> bool:
    return len({call.inputs[name].shape[1] for call in calls}) == 1
