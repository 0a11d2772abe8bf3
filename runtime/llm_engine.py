"""The engine behind LLM and servers: requests in, steps, outputs."""

import time
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from porter.runtime.block_manager import BlockManager
from porter.runtime.completion import Completion
from porter.runtime.config import EngineConfig
from porter.runtime.errors import RequestError
from porter.runtime.executor import Executor
from porter.runtime.model_runner import PromptTargets
from porter.runtime.outputs import Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from porter.runtime.sampling import LogprobsTensors, RequestOutputKind, SamplingParams
from porter.runtime.sampling_batch import build_sampling_metadata, child_seed
from porter.runtime.scheduler import ScheduledBatch, Scheduler
from porter.runtime.sequence import Sequence
from porter.runtime.step_input import BatchArrays, IntArray

_NO_ROWS = np.zeros(0, dtype=np.int64)


class _Request:
    def __init__(self, prompt: str | None, completions: list[Completion], num_prompt_logprobs: int | None) -> None:
        self.prompt = prompt
        self.completions = completions
        self.metrics = RequestMetrics(time.monotonic())
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if num_prompt_logprobs is None else [None]

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


class LLMEngine:
    """Serves requests by steps: `add_request`, then `step` until `has_unfinished_requests` is False.

    Not thread-safe: one thread adds and steps.
    """

    def __init__(self, config: EngineConfig, tokenizer: Any | None, eos_token_ids: frozenset[int]) -> None:
        self.executor = Executor(config)
        num_blocks = self.executor.num_blocks
        if num_blocks * config.block_size < config.max_model_len:
            config = self._shortened(config, num_blocks)
        self.config = config
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.vocab_size = int(config.hf_config.get_text_config().vocab_size)
        self.block_manager = BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(self.block_manager, config.max_num_seqs, config.max_num_batched_tokens)
        self._arrays = BatchArrays(config.max_num_seqs, config.max_model_len, config.block_size)
        self._requests: dict[str, _Request] = {}
        self._seeds = np.random.default_rng(config.seed)
        self._token_text = lru_cache(maxsize=65536)(self._decode_token)

    def add_request(self, request_id: str, prompt: str | list[int], params: SamplingParams) -> None:
        """Queue a prompt (text or token ids); raises RequestError if it can't be served."""
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use", "choose another")
        token_ids = self._tokenize(prompt) if isinstance(prompt, str) else prompt
        self._check(token_ids, params)
        base = params.seed if params.seed is not None else int(self._seeds.integers(2**62))
        stop_ids = params.stop_ids if params.ignore_eos else params.stop_ids | self.eos_token_ids
        stop_ids = frozenset(token for token in stop_ids if token < self.vocab_size)
        completions = []
        for index in range(params.n):
            wanted = params.prompt_logprobs if index == 0 else None
            seq = Sequence(request_id, list(token_ids), params, index, child_seed(base, index), stop_ids)
            seq.num_prompt_logprobs = wanted
            completions.append(Completion(seq, self.tokenizer, self.eos_token_ids, self.config.max_model_len))
            self.scheduler.add(seq)
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
        return self.scheduler.has_unfinished()

    def step(self) -> list[RequestOutput]:
        """Compute one step; returns what is new, as each request's `output_kind` asks."""
        batch = self.scheduler.schedule()
        if not batch.sequences:
            return []
        self._arrays.sync(batch)
        ends = np.cumsum(batch.num_new_tokens)
        places = [i for i, seq in enumerate(batch.sequences) if self._reaches_end(seq, batch.num_new_tokens[i])]
        rows, targets = self._prompt_rows(batch, ends)
        buffer = self._arrays.pack(batch, np.array(places, dtype=np.int64), rows)
        sampled = [batch.sequences[i] for i in places]
        metadata = build_sampling_metadata(sampled, self.vocab_size, self.config.device)
        now = time.monotonic()
        for seq in batch.admitted:
            metrics = self._requests[seq.request_id].metrics
            metrics.first_scheduled_time = metrics.first_scheduled_time or now
        output = self.executor.execute(buffer, metadata, targets)
        self._take_prompt_logprobs(batch, output.prompt_logprobs)
        self.scheduler.mark_computed(batch)
        return self._take_tokens(sampled, output.token_ids, output.logprobs)

    def shutdown(self) -> None:
        """Stop the processes of the other ranks, if there are any."""
        self.executor.shutdown()

    @staticmethod
    def _reaches_end(seq: Sequence, num_new: int) -> bool:
        return seq.num_computed_tokens + num_new == seq.num_tokens

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

    def _check(self, token_ids: list[int], params: SamplingParams) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty", "give at least one token")
        if len(token_ids) >= self.config.max_model_len:
            raise RequestError(
                f"the prompt's {len(token_ids)} tokens leave no room in max_model_len {self.config.max_model_len}",
                "shorten the prompt or raise max_model_len",
            )
        named = [*token_ids, *(params.logit_bias or {}), *params.stop_ids]
        if min(named) < 0 or max(named) >= self.vocab_size:
            wrong = next(token for token in named if not 0 <= token < self.vocab_size)
            raise RequestError(f"token id {wrong} is not in the vocabulary of {self.vocab_size}")
        if params.stop_strings and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer", "use stop_token_ids")

    def _prompt_rows(self, batch: ScheduledBatch, ends: IntArray) -> tuple[IntArray, PromptTargets | None]:
        rows, targets, most = [], [], 0
        for seq, start, stop, place in self._prompt_spans(batch, ends):
            rows.append(np.arange(stop - start) + place)
            targets.append(np.array(seq.prompt_token_ids[start + 1 : stop + 1], dtype=np.int64))
            most = max(most, seq.num_prompt_logprobs or 0)
        if not rows:
            return _NO_ROWS, None
        return np.concatenate(rows), PromptTargets(np.concatenate(targets), most)

    def _prompt_spans(self, batch: ScheduledBatch, ends: IntArray) -> Iterable[tuple[Sequence, int, int, int]]:
        """(sequence, first and last + 1 prompt position with a wanted row in this step, the first one's place)."""
        for seq, num_new, end in zip(batch.sequences, batch.num_new_tokens, ends.tolist(), strict=True):
            if seq.num_prompt_logprobs is None:
                continue
            start = max(seq.num_computed_tokens, seq.num_prompt_logprobs_done)
            stop = min(seq.num_computed_tokens + num_new, len(seq.prompt_token_ids) - 1)
            if start < stop:
                yield seq, start, stop, end - num_new + start - seq.num_computed_tokens

    def _take_prompt_logprobs(self, batch: ScheduledBatch, found: list[LogprobsTensors]) -> None:
        if not found:
            return
        rows = [row for tensors in found for row in _rows(tensors)]
        place = 0
        for seq, start, stop, _ in self._prompt_spans(batch, np.cumsum(batch.num_new_tokens)):
            listed = self._requests[seq.request_id].prompt_logprobs
            assert listed is not None
            assert seq.num_prompt_logprobs is not None
            for row in rows[place : place + stop - start]:
                listed.append(self._token_logprobs(row, seq.num_prompt_logprobs))
            seq.num_prompt_logprobs_done = stop
            place += stop - start

    def _take_tokens(
        self, sampled: list[Sequence], token_ids: list[int], logprobs: LogprobsTensors | None
    ) -> list[RequestOutput]:
        rows = None if logprobs is None else _rows(logprobs)
        self._arrays.append([seq.row for seq in sampled], token_ids)
        touched: dict[str, _Request] = {}
        for i, (seq, token_id) in enumerate(zip(sampled, token_ids, strict=True)):
            request = touched[seq.request_id] = self._requests[seq.request_id]
            completion = request.completions[seq.index]
            if rows is not None and seq.params.logprobs is not None:
                completion.cumulative_logprob += rows[i][1][0]
                completion.logprobs.append(self._token_logprobs(rows[i], seq.params.logprobs))
            completion.append(token_id)
            if completion.finish_reason is not None:
                self.scheduler.finish(seq)
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
