"""The decode step as CUDA graphs: inputs, model, logits and sampling in one launch, a graph for each of some sizes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from porter.kernels.decode_inputs import decode_inputs
from porter.kernels.sample_tokens import sample_tokens
from porter.runtime.config import EngineConfig
from porter.runtime.deferred import materialize
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.sampling_batch import PlainSampling
from porter.runtime.step_input import HEADER_FIELDS

_STAGES = 3  # buffers on the host: the one being filled, and those that copies may still read


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: close together where a padded row costs most."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1024, 32)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


@dataclass(frozen=True)
class DecodeInputs:
    """Where the graphs read: arrays of max_num_seqs rows, of which a graph of n sequences uses the first n."""

    buffer: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    context_lens: torch.Tensor
    cu_seqlens: torch.Tensor
    block_tables: torch.Tensor
    seeds: torch.Tensor
    rows: torch.Tensor
    temperature: torch.Tensor

    @classmethod
    def make(cls, num_rows: int, max_blocks: int, device: torch.device) -> "DecodeInputs":
        size = 8 * (HEADER_FIELDS + 4 * num_rows) + 4 * (2 * num_rows + 2 + num_rows * max_blocks) + 20 * num_rows
        long, short = (torch.zeros(num_rows, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
        return cls(
            buffer=torch.zeros(-(-size // 8) * 8, dtype=torch.uint8, device=device),
            input_ids=long,
            positions=long.clone(),
            slot_mapping=long.clone() - 1,
            context_lens=short,
            cu_seqlens=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
            block_tables=torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device),
            seeds=long.clone(),
            rows=long.clone(),
            temperature=torch.zeros(num_rows, dtype=torch.float32, device=device),
        )

    def spread(self, size: int, last_tokens: torch.Tensor) -> None:
        """Take the first `size` rows from the buffer."""
        decode_inputs(
            self.buffer,
            last_tokens,
            self.input_ids[:size],
            self.positions[:size],
            self.slot_mapping[:size],
            self.context_lens[:size],
            self.block_tables[:size],
            self.seeds[:size],
            self.rows[:size],
            self.temperature[:size],
            HEADER_FIELDS,
        )

    def metadata(self, size: int, max_model_len: int) -> AttentionMetadata:
        """The first `size` rows as a step."""
        return AttentionMetadata(
            slot_mapping=self.slot_mapping[:size],
            block_tables=self.block_tables[:size],
            context_lens=self.context_lens[:size],
            cu_seqlens_q=self.cu_seqlens[: size + 1],
            max_seqlen_q=1,
            max_context_len=max_model_len,
            num_decodes=size,
        )


class DecodeGraphs:
    """Captured decode steps. `run` replays the smallest that holds the batch.

    `last_tokens` `[max_num_seqs + 1]` holds the newest token of each engine row; its last place is for rows without a
    sequence.
    """

    def __init__(
        self, model: Any, kv_caches: list[torch.Tensor | None], config: EngineConfig, last_tokens: torch.Tensor
    ) -> None:
        self._model, self._kv_caches, self._config, self._last_tokens = model, kv_caches, config, last_tokens
        max_blocks = -(-config.max_model_len // config.block_size)
        self._inputs = DecodeInputs.make(config.max_num_seqs, -(-max_blocks // 16) * 16 + 16, config.device)
        size = len(self._inputs.buffer)
        on_gpu = config.device.type == "cuda"
        self._staging = [torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(_STAGES)]
        self._views = [stage.numpy() for stage in self._staging]
        self._num_runs = 0
        self._pool: Any = None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}

    @property
    def sizes(self) -> list[int]:
        """The captured batch sizes, ascending."""
        return sorted(self._graphs)

    def capture(self) -> None:
        """Record every size, the largest first, so that the others fit into its memory."""
        for size in reversed(graph_sizes(self._config.max_num_seqs)):
            self.compute(size)  # compiles kernels, and sets up what may not be set up while capturing
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                tokens, logits = self.compute(size)
            self._pool = self._pool or graph.pool()
            self._graphs[size] = graph, tokens, logits

    @torch.no_grad()
    def compute(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A step of `size` rows: tokens `[size]` and logits `[size, vocab]`."""
        inputs = self._inputs
        inputs.spread(size, self._last_tokens)
        metadata = inputs.metadata(size, self._config.max_model_len)
        hidden = materialize(self._model(inputs.input_ids[:size], inputs.positions[:size], self._kv_caches, metadata))
        logits = materialize(self._model.compute_logits(hidden))
        tokens = sample_tokens(logits, inputs.temperature[:size], inputs.seeds[:size])
        self._last_tokens.index_copy_(0, inputs.rows[:size], tokens)
        return tokens, logits

    def run(self, packed: npt.NDArray[np.uint8], sampling: PlainSampling) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[n]` and logits `[n, vocab]` of a packed decode step of n sequences; overwritten by the next run."""
        num_seqs = len(sampling.rows)
        self._stage(packed, sampling)
        size = next(size for size in self.sizes if size >= num_seqs)
        graph, tokens, logits = self._graphs[size]
        graph.replay()
        return tokens[:num_seqs], logits[:num_seqs]

    def _stage(self, packed: npt.NDArray[np.uint8], sampling: PlainSampling) -> None:
        place = self._num_runs % _STAGES
        self._num_runs += 1
        view, stop = self._views[place], len(packed)
        view[:stop] = packed
        start = -(-stop // 8) * 8
        for array in (sampling.seeds, sampling.rows, sampling.temperature):
            stop = start + array.nbytes
            view[start:stop] = array.view(np.uint8)
            start = stop
        self._inputs.buffer[:stop].copy_(self._staging[place][:stop], non_blocking=True)
