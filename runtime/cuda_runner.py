"""The model runner of a GPU: a step runs while the host prepares the next; decode steps are CUDA graphs."""

import gc
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from porter.kernels.sample_tokens import sample_tokens
from porter.runtime.config import EngineConfig
from porter.runtime.cuda_graphs import DecodeGraphs
from porter.runtime.deferred import materialize
from porter.runtime.layers.state import keeps_states
from porter.runtime.model_runner import Launched, ModelRunner, PromptTargets, StepOutput, dummy_step
from porter.runtime.sampling import LogprobsTensors, SamplingMetadata
from porter.runtime.sampling_batch import PlainSampling
from porter.runtime.step_input import StepInput, is_decode, unpack

_MANY = 128  # a chunk of so many tokens is attended to in the largest tiles


class CudaRunner(ModelRunner):
    """As ModelRunner, for one GPU without tensor parallelism.

    An input id of -(r + 1) stands for the token that the step before sampled for engine row r: the host need not know
    it yet.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        # the newest token of each row of the engine; the last place is for rows of a graph without a sequence
        self.last_tokens = torch.zeros(config.max_num_seqs + 1, dtype=torch.int64, device=config.device)
        self.graphs: DecodeGraphs | None = None

    @torch.no_grad()
    def warm_up(self) -> None:
        """Run the largest prefill, and one step of each kind: what they need shows in the free memory, and kernels are
        compiled before there are requests."""
        config = self.config
        num_tokens = min(config.max_num_batched_tokens, config.max_model_len)
        self.kv_caches = self.make_caches(1)
        for query_lens in ([1], [1, 2], [1, _MANY]):
            if sum(query_lens) <= num_tokens:
                self.execute_hidden(dummy_step(query_lens, config.block_size, config.device))
        hidden = self.execute_hidden(dummy_step([num_tokens], config.block_size, config.device))
        rows = hidden[:1].expand(min(config.max_num_seqs, num_tokens), -1)
        logits = materialize(self.model.compute_logits(rows))
        zeros = torch.zeros(len(rows), dtype=torch.int64, device=config.device)
        sample_tokens(logits, zeros.float(), zeros)
        torch.cuda.synchronize()
        self.kv_caches = []

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache, then record the decode steps on it (unless `enforce_eager`). Layers with states sort a
        step's sequences on the host, which a graph can't hold."""
        super().allocate(num_blocks)
        if not self.config.enforce_eager and not keeps_states(self.model):
            self.graphs = self._captured()
        # a collection of Python's would walk the whole model in the middle of a step
        gc.collect()
        gc.freeze()

    def _captured(self) -> DecodeGraphs | None:
        graphs = DecodeGraphs(self.model, self.kv_caches, self.config, self.last_tokens)
        try:
            graphs.capture()
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            warnings.warn(f"this port can't be recorded in CUDA graphs and decodes eagerly: {reason}", stacklevel=2)
            torch.cuda.synchronize()
            return None
        return graphs

    @torch.no_grad()
    def launch(
        self,
        buffer: npt.NDArray[np.uint8],
        sampling_metadata: SamplingMetadata | None = None,
        prompt_targets: PromptTargets | None = None,
        plain: PlainSampling | None = None,
    ) -> Launched:
        """Start the step in `buffer`; `plain` says which rows sample, `sampling_metadata` how, if not plainly."""
        assert plain is not None
        if self.graphs is not None and is_decode(buffer):
            tokens, logits = self.graphs.run(buffer, plain)
            return self._sampled(tokens, logits, sampling_metadata, plain, [])
        step = unpack(torch.from_numpy(buffer), self.config.device)
        hidden = self.execute_hidden(self._with_last_tokens(step))[step.logits_rows]
        prompt_logprobs = self._prompt_logprobs(hidden[step.num_sampled :], prompt_targets)
        if not step.num_sampled:
            return InFlight(None, None, prompt_logprobs)
        logits = materialize(self.model.compute_logits(hidden[: step.num_sampled]))
        rows, seeds, temperature = (
            torch.from_numpy(x).pin_memory().to(self.config.device, non_blocking=True)
            for x in (plain.rows, plain.seeds, plain.temperature)
        )
        tokens = sample_tokens(logits, temperature, seeds)
        self.last_tokens.index_copy_(0, rows, tokens)
        return self._sampled(tokens, logits, sampling_metadata, plain, prompt_logprobs)

    def _sampled(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        metadata: SamplingMetadata | None,
        plain: PlainSampling,
        prompt_logprobs: list[LogprobsTensors],
    ) -> "InFlight":
        logprobs = None
        if metadata is not None:
            output = self.model.sample(logits, metadata)
            tokens, logprobs = output.token_ids, output.logprobs
            rows = torch.from_numpy(plain.rows).to(tokens.device)
            self.last_tokens.index_copy_(0, rows, tokens)
        return InFlight(tokens, logprobs, prompt_logprobs)

    def _with_last_tokens(self, step: StepInput) -> StepInput:
        known = step.input_ids >= 0
        newest = self.last_tokens[(-step.input_ids - 1).clamp(min=0)]
        step.input_ids.copy_(torch.where(known, step.input_ids, newest))
        return step


class InFlight(Launched):
    """A step that the GPU is running; its results are on their way to the host."""

    def __init__(
        self,
        token_ids: torch.Tensor | None,
        logprobs: LogprobsTensors | None,
        prompt_logprobs: list[LogprobsTensors],
    ) -> None:
        self._token_ids = None if token_ids is None else _to_host(token_ids)
        self._logprobs = None if logprobs is None else _logprobs_to_host(logprobs)
        self._prompt_logprobs = [_logprobs_to_host(each) for each in prompt_logprobs]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record()

    def result(self) -> StepOutput:
        """Waits for the step."""
        self._done.synchronize()
        token_ids: Any = [] if self._token_ids is None else self._token_ids.tolist()
        return StepOutput(token_ids, self._logprobs, self._prompt_logprobs)


def _to_host(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _logprobs_to_host(x: LogprobsTensors) -> LogprobsTensors:
    return LogprobsTensors(_to_host(x.token_ids), _to_host(x.logprobs), _to_host(x.ranks))
