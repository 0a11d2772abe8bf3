"""The engine behind LLM and servers: requests in, steps, outputs."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from porter.runtime.block_manager import BlockManager
from porter.runtime.completion import Completion
from porter.runtime.config import EngineConfig
from porter.runtime.errors import RequestError
from porter.runtime.executor import Executor
from porter.runtime.layers.state import keeps_states
from porter.runtime.model_runner import Launched, PromptTargets
from porter.runtime.outputs import Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from porter.runtime.request_check import check_request
from porter.runtime.sampling import LogprobsTensors, RequestOutputKind, SamplingMetadata, SamplingParams
from porter.runtime.sampling_batch import build_sampling_metadata, child_seed
from porter.runtime.scheduler import ScheduledBatch, Scheduler
from porter.runtime.sequence import Sequence, SequenceStatus
from porter.runtime.step_input import BatchArrays, IntArray
from porter.runtime.structured_outputs import GrammarCompiler, Matcher, StructuredOutputs

_NO_ROWS = np.zeros(0, dtype=np.int64)


class _Request:
    def __init__(self, prompt: str | None, completions: list[Completion], num_prompt_logprobs: int | None) -> None:
        self.prompt = prompt
        self.completions = completions
        self.metrics = RequestMetrics(time.monotonic())
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if num_prompt_logprobs is None else [None]
        self.is_silent = False  # once its first token is noted, nothing is told of it before its end

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)

    def render(self, request_id: str) -> RequestOutput:
        first = self.completions[0].seq
        return RequestOutput(
            request_id=request_id,
            prompt=self.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=[completion.render() for completion in self.completions],
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            metrics=self.metrics,
            num_cached_tokens=max(first.num_cached_tokens, 0),
        )


# A sequence, its first and last + 1 prompt position with a wanted row in a step, and the place of the first one's row
_PromptSpan = tuple[Sequence, int, int, int]


@dataclass(frozen=True)
class _Step:
    """A launched step: the sequences that get a token, and those that get prompt logprobs."""

    launched: Launched
    sampled: list[Sequence]
    prompt_spans: list[_PromptSpan]


class LLMEngine:
    """Serves requests by steps: `add_request`, then `step` until `has_unfinished_requests` is False.

    Not thread-safe: one thread adds and steps.
    """

    def __init__(self, config: EngineConfig, tokenizer: Any | None, eos_token_ids: frozenset[int]) -> None:
        self.executor = Executor(config)
        num_blocks = self.executor.num_blocks
        if num_blocks * config.block_size < config.max_model_len:
            config = self._shortened(config, num_blocks)
        keeps = keeps_states(self.executor.model)
        if keeps:  # what a prefix's blocks hold is not all that comes from the prefix
            config = replace(config, enable_prefix_caching=False)
        self.config = config
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.vocab_size = int(config.hf_config.get_text_config().vocab_size)
        self.block_manager = BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(self.block_manager, config.max_num_seqs, config.max_num_batched_tokens)
        # kernels read rows of tables that begin at multiples of 64 bytes
        multiple = 16 if config.device.type == "cuda" else 1
        self._arrays = BatchArrays(config.max_num_seqs, config.max_model_len, config.block_size, multiple, keeps)
        self._requests: dict[str, _Request] = {}
        self._steps: deque[_Step] = deque()
        self._seeds = np.random.default_rng(config.seed)
        self._grammars: GrammarCompiler | None = None
        self._token_text = lru_cache(maxsize=65536)(self._decode_token)

    def add_request(self, request_id: str, prompt: str | list[int], params: SamplingParams) -> None:
        """Queue a prompt (text or token ids); raises RequestError if it can't be served."""
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use", "choose another")
        token_ids = self._tokenize(prompt) if isinstance(prompt, str) else prompt
        check_request(token_ids, params, self.config.max_model_len, self.vocab_size, self.tokenizer is not None)
        base = params.seed if params.seed is not None else int(self._seeds.integers(2**62))
        stop_ids = params.stop_ids if params.ignore_eos else params.stop_ids | self.eos_token_ids
        stop_ids = frozenset(token for token in stop_ids if token < self.vocab_size)
        completions = []
        for index in range(params.n):
            wanted = params.prompt_logprobs if index == 0 else None
            seq = Sequence(request_id, list(token_ids), params, index, child_seed(base, index), stop_ids)
            seq.num_prompt_logprobs = wanted
            seq.matcher = None if params.structured_outputs is None else self._matcher(params.structured_outputs)
            completions.append(Completion(seq, self.tokenizer, self.eos_token_ids, self.config.max_model_len))
            seq.max_length = len(token_ids) + completions[-1].max_tokens
        for completion in completions:
            self.scheduler.add(completion.seq)
        text = prompt if isinstance(prompt, str) else None
        self._requests[request_id] = _Request(text, completions, params.prompt_logprobs)

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request at what it has; None if it is unknown or already over."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        for completion in request.completions:
            if completion.finish_reason is None:
                self.scheduler.finish(completion.seq)
                completion.abort()
        return request.render(request_id)

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished() or bool(self._steps)

    def step(self) -> list[RequestOutput]:
        """Launch a step and take in one; returns what is new, as each request's `output_kind` asks.

        On a GPU the step taken in is the one before, so that the GPU runs one while the host prepares the next: a
        sequence that ends is noticed one step late, and what was computed for it since is dropped.
        """
        outputs = []
        ahead = 1 if self._may_run_ahead() else 0
        while len(self._steps) > ahead:
            outputs += self._take_step()
        batch = self.scheduler.schedule()
        if batch.sequences:
            self._steps.append(self._launch(batch))
        if len(self._steps) > ahead or (self._steps and not batch.sequences):
            outputs += self._take_step()
        return outputs

    def _may_run_ahead(self) -> bool:
        """Penalties and forms need to know every token before the next is sampled."""
        return self.executor.runs_ahead and not any(seq.params.needs_output for seq in self.scheduler.running)

    def _launch(self, batch: ScheduledBatch) -> _Step:
        self._arrays.sync(batch)
        ends = np.cumsum(batch.num_new_tokens)
        spans = list(self._prompt_spans(batch, ends))
        rows, targets = self._prompt_rows(spans)
        buffer = self._arrays.pack(batch, np.array(batch.sampled, dtype=np.int64), rows)
        sampled = [batch.sequences[i] for i in batch.sampled]
        now = time.monotonic()
        for seq in batch.admitted:
            metrics = self._requests[seq.request_id].metrics
            metrics.first_scheduled_time = metrics.first_scheduled_time or now
        launched = self.executor.launch(buffer, self._metadata(sampled), targets, self._arrays.plain_sampling(batch))
        self.scheduler.mark_computed(batch)
        for seq in sampled:
            seq.num_in_flight += 1
        for seq, _, stop, _ in spans:
            seq.num_prompt_logprobs_done = stop
        return _Step(launched, sampled, spans)

    def _metadata(self, sampled: list[Sequence]) -> SamplingMetadata | None:
        if self.executor.runs_ahead and all(seq.params.is_plain for seq in sampled):
            return None
        return build_sampling_metadata(sampled, self.vocab_size, self.config.device)

    def _take_step(self) -> list[RequestOutput]:
        step = self._steps.popleft()
        output = step.launched.result()
        assert output is not None
        self._take_prompt_logprobs(step.prompt_spans, output.prompt_logprobs)
        return self._take_tokens(step.sampled, output.token_ids, output.logprobs)

    def shutdown(self) -> None:
        """Stop the processes of the other ranks, if there are any."""
        self.executor.shutdown()

    def _shortened(self, config: EngineConfig, num_blocks: int) -> EngineConfig:
        capacity = num_blocks * config.block_size
        if config.max_model_len_is_given:
            self.executor.shutdown()
            raise RequestError(
                f"the KV cache has room for {capacity} tokens, less than max_model_len {config.max_model_len}",
                "lower max_model_len or free memory",
            )
        return replace(config, max_model_len=capacity)

    def _tokenize(self, prompt: str) -> list[int]:
        if self.tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer", "pass prompt_token_ids, or load the tokenizer")
        token_ids: list[int] = self.tokenizer(prompt)["input_ids"]
        return token_ids

    def _matcher(self, wanted: StructuredOutputs) -> Matcher:
        if self.tokenizer is None:
            raise RequestError("structured_outputs needs a tokenizer", "load the tokenizer")
        if self._grammars is None:
            self._grammars = GrammarCompiler(self.tokenizer, self.vocab_size, self.eos_token_ids)
        return self._grammars.matcher(wanted)

    def _prompt_rows(self, spans: list[_PromptSpan]) -> tuple[IntArray, PromptTargets | None]:
        rows, targets, most = [], [], 0
        for seq, start, stop, place in spans:
            rows.append(np.arange(stop - start) + place)
            targets.append(np.array(seq.prompt_token_ids[start + 1 : stop + 1], dtype=np.int64))
            most = max(most, seq.num_prompt_logprobs or 0)
        if not rows:
            return _NO_ROWS, None
        return np.concatenate(rows), PromptTargets(np.concatenate(targets), most)

    def _prompt_spans(self, batch: ScheduledBatch, ends: IntArray) -> Iterable[_PromptSpan]:
        for seq, num_new, end in zip(batch.sequences, batch.num_new_tokens, ends.tolist(), strict=True):
            if seq.num_prompt_logprobs is None:
                continue
            start = max(seq.num_computed_tokens, seq.num_prompt_logprobs_done)
            stop = min(seq.num_computed_tokens + num_new, len(seq.prompt_token_ids) - 1)
            if start < stop:
                yield seq, start, stop, end - num_new + start - seq.num_computed_tokens

    def _take_prompt_logprobs(self, spans: list[_PromptSpan], found: list[LogprobsTensors]) -> None:
        if not found:
            return
        rows = [row for tensors in found for row in _rows(tensors)]
        first = 0
        for seq, start, stop, _ in spans:
            request = self._requests.get(seq.request_id)
            if request is not None and request.prompt_logprobs is not None and seq.num_prompt_logprobs is not None:
                for row in rows[first : first + stop - start]:
                    request.prompt_logprobs.append(self._token_logprobs(row, seq.num_prompt_logprobs))
            first += stop - start

    def _take_tokens(
        self, sampled: list[Sequence], token_ids: list[int], logprobs: LogprobsTensors | None
    ) -> list[RequestOutput]:
        rows = None if logprobs is None else _rows(logprobs)
        running = [i for i, seq in enumerate(sampled) if seq.status is SequenceStatus.RUNNING]
        self._arrays.append([sampled[i].row for i in running], [token_ids[i] for i in running])
        touched: dict[str, _Request] = {}
        for i, (seq, token_id) in enumerate(zip(sampled, token_ids, strict=True)):
            seq.num_in_flight -= 1
            if seq.status is SequenceStatus.FINISHED:
                continue
            request = self._requests[seq.request_id]
            completion = request.completions[seq.index]
            if rows is not None and seq.params.logprobs is not None:
                completion.cumulative_logprob += rows[i][1][0]
                completion.logprobs.append(self._token_logprobs(rows[i], seq.params.logprobs))
            completion.append(token_id)
            if completion.finish_reason is not None:
                self.scheduler.finish(seq)
            elif request.is_silent:
                continue
            touched[seq.request_id] = request
        return self._outputs(touched)

    def _outputs(self, touched: dict[str, _Request]) -> list[RequestOutput]:
        now = time.monotonic()
        outputs = []
        for request_id, request in touched.items():
            request.metrics.first_token_time = request.metrics.first_token_time or now
            if request.finished:
                request.metrics.finished_time = now
                del self._requests[request_id]
            elif request.completions[0].seq.params.output_kind is RequestOutputKind.FINAL_ONLY:
                request.is_silent = True
                continue
            outputs.append(request.render(request_id))
        return outputs

    def _token_logprobs(self, row: tuple[list[int], list[float], int], k: int) -> TokenLogprobs:
        token_ids, logprobs, rank = row
        found = {token_ids[0]: Logprob(logprobs[0], rank, self._token_text(token_ids[0]))}
        for place in range(1, min(k, len(token_ids) - 1) + 1):
            if token_ids[place] != token_ids[0]:
                found[token_ids[place]] = Logprob(logprobs[place], place, self._token_text(token_ids[place]))
        return found

    def _decode_token(self, token_id: int) -> str | None:
        return None if self.tokenizer is None else str(self.tokenizer.decode([token_id]))


def _rows(tensors: LogprobsTensors) -> list[tuple[list[int], list[float], int]]:
    return list(zip(tensors.token_ids.tolist(), tensors.logprobs.tolist(), tensors.ranks.tolist(), strict=True))
