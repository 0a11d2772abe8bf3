"""The port: built, loaded, and run on several prompts in one forward through paged caches of its own."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from porter.runtime.checkpoint import iterate_weights
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.model_runner import torch_defaults
from porter.verify.trace import Inputs, Trace, bound_arguments, flatten, recording

BLOCK_SIZE = 4


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


def build_port(port: type[nn.Module], config: Any, dtype: torch.dtype, linear_method: Any = None) -> Any:
    """An instance of a port class in `dtype`, its weights not loaded yet."""
    with torch_defaults(dtype, torch.device("cpu")):
        return port(config, linear_method).eval().requires_grad_(False)


def load_port_weights(model: Any, folder: Path) -> Any:
    """Fill a port from a checkpoint folder; WeightError if it doesn't fit."""
    model.load_weights(iterate_weights(folder))
    return model


@torch.inference_mode()
def run_port(model: Any, prompts: list[list[int]]) -> PortRun:
    """One forward over all prompts, flat, with every module recorded."""
    with recording(model, sum(map(len, prompts))) as trace:
        logits = port_logits(model, prompts)
    return PortRun(trace, logits)


@torch.inference_mode()
def port_logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Logits `[num_tokens, vocab]` in float32 of one forward over all prompts."""
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    metadata = prefill_metadata([len(prompt) for prompt in prompts])
    hidden_states = model(tokens, positions, new_caches(model, metadata), metadata)
    logits: torch.Tensor = model.compute_logits(hidden_states).float()
    return logits


@torch.inference_mode()
def replay(model: Any, prompts: list[list[int]], module: str, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """What `module` returns when the original's `inputs` replace its own; empty when they can't."""
    state = _Replay()
    num_tokens = sum(map(len, prompts))
    handles = _replaying(model.get_submodule(module), inputs, num_tokens, state)
    try:
        port_logits(model, prompts)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return state.outputs if state.done else ()


def prefill_metadata(lengths: list[int]) -> AttentionMetadata:
    """Metadata of whole prompts in blocks that lie in a shuffled order."""
    needed = [-(-length // BLOCK_SIZE) for length in lengths]
    blocks = torch.split(torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)), needed)
    return AttentionMetadata.for_sequences(lengths, lengths, [part.tolist() for part in blocks], BLOCK_SIZE)


def new_caches(model: nn.Module, metadata: AttentionMetadata) -> list[torch.Tensor]:
    """One cache an attention layer, full of values that nothing may read before it writes them."""
    num_blocks = int(metadata.block_tables.max()) + 1
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point() and not getattr(p, "derived", False))
    layers = _attention_layers(model)
    return [torch.full(layer.cache_shape(num_blocks, BLOCK_SIZE), 9.0, dtype=dtype) for layer in layers]


def _attention_layers(module: nn.Module) -> Iterator[Any]:
    if hasattr(module, "cache_shape"):
        yield module
    else:
        for child in module.children():
            yield from _attention_layers(child)


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
    """The float arguments over tokens, taken from `inputs` by name, or the only one of each."""
    own = {name: value for name, value in arguments.items() if _is_activation(value, num_tokens)}
    pairs = {name: name for name in own if name in inputs}
    if not pairs and len(own) == len(inputs) == 1:
        pairs = {next(iter(own)): next(iter(inputs))}
    fitting = {name: source for name, source in pairs.items() if inputs[source].numel() == own[name].numel()}
    return {name: inputs[source].reshape(own[name].shape).to(own[name].dtype) for name, source in fitting.items()}


def _is_activation(value: Any, num_tokens: int) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[:1] == (num_tokens,)
