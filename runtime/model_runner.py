"""Holds one rank's model and KV cache, and computes steps."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from porter.runtime.checkpoint import iterate_weights
from porter.runtime.config import EngineConfig
from porter.runtime.deferred import materialize
from porter.runtime.errors import ConfigError
from porter.runtime.layers.linear import LinearMethod
from porter.runtime.layers.packing import pack_weights
from porter.runtime.layers.state import state_bytes
from porter.runtime.loader import build_port
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.model_registry import load_port
from porter.runtime.quantization.registry import get_linear_method
from porter.runtime.sampling import LogprobsTensors, SamplerOutput, SamplingMetadata, gather_logprobs
from porter.runtime.sampling_batch import PlainSampling
from porter.runtime.step_input import StepInput, unpack

# Prompt logprobs need logits for every prompt token: so many are made at once
_PROMPT_ROWS = 256
_CPU_CACHE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class PromptTargets:
    """For the step's prompt rows: the token that follows each, int64 [num_rows], and how many logprobs are wanted."""

    token_ids: npt.NDArray[np.int64]
    num_logprobs: int


@dataclass(frozen=True)
class StepOutput:
    """Sampled tokens [num_sampled] with their logprobs, and the logprobs of the step's prompt rows."""

    token_ids: list[int]
    logprobs: LogprobsTensors | None = None
    prompt_logprobs: list[LogprobsTensors] = field(default_factory=list)


class Launched:
    """A step that was started."""

    def __init__(self, output: StepOutput | None) -> None:
        self._output = output

    def result(self) -> StepOutput | None:
        """What came of it; None on ranks that do not sample."""
        return self._output


class ModelRunner:
    """Builds the port, fills it and runs steps; the same on every rank, but only rank 0 samples."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.model: Any = _build_model(config)
        self.attention_layers = list(attention_layers(self.model))
        self.kv_caches: list[torch.Tensor | None] = []

    def num_blocks_in_memory(self) -> int:
        """How many blocks fit: what is left of a GPU, or an eighth of the memory (4 GiB at most) on a CPU."""
        config = self.config
        shapes = [layer.cache_shape(1, config.block_size) for layer in self.attention_layers if layer is not None]
        block_bytes = sum(int(np.prod(shape)) for shape in shapes) * config.dtype.itemsize
        if config.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(config.device)
            memory = free - int(total * (1 - config.gpu_memory_utilization))
        else:
            memory = min(_physical_memory() // 8, _CPU_CACHE_BYTES) // config.tensor_parallel_size
        memory -= config.max_num_seqs * state_bytes(self.model)
        most_useful = config.max_num_seqs * -(-config.max_model_len // config.block_size)
        return max(min(memory // max(block_bytes, 1), most_useful), 0)

    def warm_up(self) -> None:
        """Run the largest step once, so that what it needs besides the cache shows in the free memory."""
        num_tokens = min(self.config.max_num_batched_tokens, self.config.max_model_len)
        self.kv_caches = self.make_caches(1)
        self.execute_hidden(dummy_step([num_tokens], self.config.block_size, self.config.device))
        self.kv_caches = []

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache."""
        self.kv_caches = self.make_caches(num_blocks)

    def make_caches(self, num_blocks: int) -> list[torch.Tensor | None]:
        """A cache for each attention layer; zeros, so that no stale NaN can enter a masked product."""
        return [layer and self._make_cache(layer, num_blocks) for layer in self.attention_layers]

    def _make_cache(self, layer: Any, num_blocks: int) -> torch.Tensor:
        shape = layer.cache_shape(num_blocks, self.config.block_size)
        return _zeros(shape, self.config.dtype, self.config.device)

    def launch(
        self,
        buffer: npt.NDArray[np.uint8],
        sampling_metadata: SamplingMetadata | None = None,
        prompt_targets: PromptTargets | None = None,
        plain: PlainSampling | None = None,
    ) -> Launched:
        """Run the step in `buffer`, now."""
        return Launched(self.execute(buffer, sampling_metadata, prompt_targets))

    @torch.no_grad()
    def execute(
        self,
        buffer: npt.NDArray[np.uint8],
        sampling_metadata: SamplingMetadata | None = None,
        prompt_targets: PromptTargets | None = None,
    ) -> StepOutput | None:
        """Run the step in `buffer`. Ranks other than 0 give no `sampling_metadata` and get None."""
        step = unpack(torch.from_numpy(buffer), self.config.device)
        hidden = self.execute_hidden(step)[step.logits_rows]
        sampled: SamplerOutput | None = None
        if step.num_sampled:
            logits = self.model.compute_logits(hidden[: step.num_sampled])
            sampled = None if sampling_metadata is None else self.model.sample(logits, sampling_metadata)
        prompt_logprobs = self._prompt_logprobs(hidden[step.num_sampled :], prompt_targets)
        if sampling_metadata is None:
            return None
        if sampled is None:
            return StepOutput([], None, prompt_logprobs)
        return StepOutput(sampled.token_ids.tolist(), sampled.logprobs, prompt_logprobs)

    def execute_hidden(self, step: StepInput) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size] of a step."""
        # on a GPU results are deferred, which counts changes in place: inference mode would not
        with torch.no_grad() if step.input_ids.is_cuda else torch.inference_mode():
            hidden = self.model(step.input_ids, step.positions, self.kv_caches, step.attn_metadata)
            return materialize(hidden)

    def _prompt_logprobs(self, hidden: torch.Tensor, targets: PromptTargets | None) -> list[LogprobsTensors]:
        found = []
        for start in range(0, len(hidden), _PROMPT_ROWS):
            logits = self.model.compute_logits(hidden[start : start + _PROMPT_ROWS])
            if targets is not None:
                token_ids = torch.from_numpy(targets.token_ids[start : start + _PROMPT_ROWS]).to(logits.device)
                found.append(gather_logprobs(logits, token_ids, targets.num_logprobs))
        return found


def _build_model(config: EngineConfig) -> nn.Module:
    port = load_port(config.port)
    with torch_defaults(config.dtype, config.device):
        model = build_port(port, config.hf_config, _linear_method(config))
    model.eval().requires_grad_(False)
    if config.load_format == "dummy":
        _fill_with_noise(model, config.seed)
    else:
        model.load_weights(iterate_weights(config.model, config.load_progress))
    pack_weights(model)
    loaded: nn.Module = model
    return loaded


def _linear_method(config: EngineConfig) -> LinearMethod | None:
    stored = getattr(config.hf_config, "quantization_config", None) or {}
    stored_name = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if stored_name is not None:
        raise ConfigError(
            f"the checkpoint is stored quantized ({getattr(stored_name, 'value', stored_name)})",
            "use its unquantized form; quantization='int8' or 'fp8' rounds that while loading",
        )
    return None if config.quantization is None else get_linear_method(config.quantization)


def _fill_with_noise(model: nn.Module, seed: int) -> None:
    for name, tensor in model.state_dict().items():
        generator = torch.Generator(tensor.device).manual_seed(seed + len(name))
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            tensor.uniform_(-1e-3, 1e-3, generator=generator)


def attention_layers(module: nn.Module) -> Iterator[Any]:
    """The layers that have a cache of keys and values, in order; None for each decoder layer without one, so that
    decoder layers can count caches as they count themselves."""
    if hasattr(module, "cache_shape"):
        yield module
        return
    found = [list(attention_layers(child)) for child in module.children()]
    spaced = isinstance(module, nn.ModuleList) and any(found)
    for layers in found:
        yield from layers or [None] * spaced


@contextmanager
def torch_defaults(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Make new floating-point tensors of `dtype` on `device`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def dummy_step(query_lens: Sequence[int], block_size: int, device: torch.device) -> StepInput:
    """A step of sequences that begin with it, whose tokens all go to block 0."""
    tables = [[0] * -(-num_tokens // block_size) for num_tokens in query_lens]
    metadata = AttentionMetadata.for_sequences(query_lens, query_lens, tables, block_size, device)
    positions = torch.cat([torch.arange(num_tokens, device=device) for num_tokens in query_lens])
    return StepInput(torch.zeros_like(positions), positions, metadata, positions[-1:], 1)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch would write every byte; this takes pages that are zero, and physical memory as they are written
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
