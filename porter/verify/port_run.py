"""The port: built, loaded, and run on several prompts, at once or in steps, through paged caches of its own."""

from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from porter.runtime.checkpoint import iterate_weights
from porter.runtime.loader import build_port
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.model_runner import attention_layers, torch_defaults
from porter.verify.schedule import BLOCK_SIZE, Schedule, Step, whole
from porter.verify.trace import Inputs, Keep, Trace, bound_arguments, flatten, join, recording


@dataclass(frozen=True)
class PortRun:
    """Module outputs and logits `[num_tokens, vocab]` (float32) of the port on some prompts."""

    trace: Trace
    logits: torch.Tensor


@dataclass
class _Replay:
    done: bool = False
    outputs: tuple[torch.Tensor, ...] = field(default=())


class _Stop(Exception):
    """Ends a forward early, once the replayed module has run."""


def new_port(port: type[nn.Module], config: Any, dtype: torch.dtype, linear_method: Any = None) -> Any:
    """An instance of a port class in `dtype`, its weights not loaded yet."""
    with torch_defaults(dtype, torch.device("cpu")):
        return build_port(port, config, linear_method).eval().requires_grad_(False)


def load_port_weights(model: Any, folder: Path) -> Any:
    """Fill a port from a checkpoint folder; WeightError if it doesn't fit."""
    model.load_weights(iterate_weights(folder))
    return model


@torch.inference_mode()
def run_port(
    model: Any, prompts: list[list[int]], dtype: torch.dtype, steps: Schedule | None = None, keep: Keep = torch.clone
) -> PortRun:
    """The prompts in one forward, or step by step, every module recorded; tokens come out in the prompts' order."""
    steps = steps or whole(prompts)
    caches = new_caches(model, steps, dtype)
    traces, logits = [], []
    for step in steps:
        with recording(model, step.num_tokens, keep) as trace:
            logits.append(_step_logits(model, prompts, step, caches))
        traces.append(trace)
    order = _prompt_order(prompts, steps)
    return PortRun(join(traces, order, keep), torch.cat(logits)[order])


@torch.inference_mode()
def port_logits(
    model: Any, prompts: list[list[int]], dtype: torch.dtype, steps: Schedule | None = None
) -> torch.Tensor:
    """Logits `[num_tokens, vocab]` in float32 of the prompts, in one forward or step by step, in the prompts' order."""
    steps = steps or whole(prompts)
    caches = new_caches(model, steps, dtype)
    logits = torch.cat([_step_logits(model, prompts, step, caches) for step in steps])
    return logits if len(steps) == 1 else logits[_prompt_order(prompts, steps)]


def _step_logits(model: Any, prompts: list[list[int]], step: Step, caches: list[Any]) -> torch.Tensor:
    tokens = torch.tensor([token for part in step.parts for token in prompts[part.prompt][part.start : part.stop]])
    positions = torch.cat([torch.arange(part.start, part.stop) for part in step.parts])
    metadata = AttentionMetadata.for_sequences(
        [part.stop - part.start for part in step.parts],
        [part.stop for part in step.parts],
        [list(part.blocks) for part in step.parts],
        BLOCK_SIZE,
        state_slots=[part.prompt for part in step.parts],
    )
    logits: torch.Tensor = model.compute_logits(model(tokens, positions, caches, metadata)).float()
    return logits


def _prompt_order(prompts: list[list[int]], steps: Schedule) -> torch.Tensor:
    """For each token of the prompts, laid end to end, its row in the steps' outputs; the last to compute it counts."""
    starts = [0, *accumulate(len(prompt) for prompt in prompts)]
    places = [starts[part.prompt] + i for step in steps for part in step.parts for i in range(part.start, part.stop)]
    order = torch.full((starts[-1],), -1)
    order[torch.tensor(places)] = torch.arange(len(places))
    assert bool((order >= 0).all()), "a schedule leaves tokens out"
    return order


@torch.inference_mode()
def replay(
    model: Any, prompts: list[list[int]], dtype: torch.dtype, module: str, inputs: Inputs
) -> tuple[torch.Tensor, ...]:
    """What `module` returns when the original's `inputs` replace its own; empty when they can't."""
    state = _Replay()
    num_tokens = sum(map(len, prompts))
    handles = _replaying(model.get_submodule(module), inputs, num_tokens, state)
    try:
        port_logits(model, prompts, dtype)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return state.outputs if state.done else ()


def new_caches(model: nn.Module, steps: Schedule, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """One cache an attention layer, full of values that nothing may read before it writes them."""
    num_blocks = 1 + max(block for step in steps for part in step.parts for block in part.blocks)
    shapes = [layer and layer.cache_shape(num_blocks, BLOCK_SIZE) for layer in attention_layers(model)]
    return [shape and torch.full(shape, 9.0, dtype=dtype) for shape in shapes]


def _replaying(module: nn.Module, inputs: Inputs, num_tokens: int, state: _Replay) -> list[Any]:
    def substitute(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = bound_arguments(module, args, kwargs)
        replaced = _substituted(arguments, inputs, num_tokens)
        if not replaced:
            raise _Stop
        state.done = True
        return (), {**arguments, **replaced}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        state.outputs = flatten(output, num_tokens)
        raise _Stop

    return [
        module.register_forward_pre_hook(substitute, with_kwargs=True),
        module.register_forward_hook(keep, with_kwargs=True),
    ]


def _substituted(arguments: dict[str, Any], inputs: Inputs, num_tokens: int) -> dict[str, torch.Tensor]:
    """The activations and choices over tokens, taken from `inputs` by name, or the only activation of each; empty if
    one of them would have to be the port's own."""
    own = {name: value for name, value in arguments.items() if _is_over_tokens(value, num_tokens)}
    pairs = {name: name for name in own if name in inputs}
    floats = [[name for name, value in each.items() if value.is_floating_point()] for each in (own, inputs)]
    if not pairs and len(own) == len(floats[0]) == len(floats[1]) == 1:
        pairs = {floats[0][0]: floats[1][0]}
    fitting = {name: source for name, source in pairs.items() if inputs[source].numel() == own[name].numel()}
    if len(fitting) < len(own):
        return {}
    return {name: inputs[source].reshape(own[name].shape).to(own[name].dtype) for name, source in fitting.items()}


def _is_over_tokens(value: Any, num_tokens: int) -> bool:
    """A tensor with a row for each token; single numbers (ids, positions) are the same in port and original."""
    return isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == num_tokens
