"""Chooses what each step computes: decodes first, then chunks of prompts, within a token budget. No tensors."""

from collections import deque
from dataclasses import dataclass

from porter.runtime.block_manager import BlockManager
from porter.runtime.sequence import Sequence, SequenceStatus


@dataclass(frozen=True)
class ScheduledBatch:
    """One step: `num_new_tokens[i]` tokens of `sequences[i]`; those at places `sampled` get a token after their last.

    `admitted` started (or restarted) in this step; `grown` are those whose block table changed, the admitted included.
    `preempted` lost their blocks and will be recomputed.
    """

    sequences: list[Sequence]
    num_new_tokens: list[int]
    admitted: list[Sequence]
    grown: list[Sequence]
    preempted: list[Sequence]
    sampled: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(self.num_new_tokens)


class Scheduler:
    """First come, first served; when blocks run out the newest running sequence is preempted and recomputed later.

    A sequence goes on while its newest token is still in flight (`Sequence.num_in_flight`).
    """

    def __init__(self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._free_rows = list(range(max_num_seqs))[::-1]

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(seq)

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> ScheduledBatch:
        """Choose the next step and give its sequences their blocks."""
        batch = ScheduledBatch([], [], [], [], [], [])
        budget = self._schedule_running(batch, self.max_num_batched_tokens)
        if not batch.preempted:
            self._schedule_waiting(batch, budget)
        return batch

    def finish(self, seq: Sequence) -> None:
        """Take a waiting or running sequence out and give back what it holds."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        elif seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED

    def mark_computed(self, batch: ScheduledBatch) -> list[int]:
        """Count the tokens of a step as computed; returns the places in the batch that get a new token."""
        for seq, num_new in zip(batch.sequences, batch.num_new_tokens, strict=True):
            seq.num_computed_tokens += num_new
        return batch.sampled

    def _schedule_running(self, batch: ScheduledBatch, budget: int) -> int:
        i = 0
        block_size = self.block_manager.block_size
        while i < len(self.running) and budget > 0:
            seq = self.running[i]
            i += 1
            length = len(seq.prompt_token_ids) + len(seq.output_token_ids) + seq.num_in_flight
            if length >= seq.max_length:
                continue  # its last token is in flight
            num_new = min(length - seq.num_computed_tokens, budget)
            end = seq.num_computed_tokens + num_new
            if end > len(seq.block_table) * block_size and not self._grow(seq, end, batch):
                break
            self._append(batch, seq, num_new, end == length)
            budget -= num_new
        return budget

    def _grow(self, seq: Sequence, num_tokens: int, batch: ScheduledBatch) -> bool:
        while not self.block_manager.allocate(seq, num_tokens):
            victim = self.running.pop()
            self._preempt(victim, batch)
            if victim is seq:
                return False
        batch.grown.append(seq)
        return True

    def _preempt(self, seq: Sequence, batch: ScheduledBatch) -> None:
        self._release(seq)
        seq.num_computed_tokens = 0
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        batch.preempted.append(seq)
        self.num_preemptions += 1

    def _schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        # A few blocks stay free for those that run, or the newcomer would soon be preempted again
        reserve = min(len(self.running), max(self.block_manager.num_blocks // 100, 1))
        while self.waiting and budget > 0 and self._free_rows:
            seq = self.waiting[0]
            prefix = [] if seq.num_prompt_logprobs is not None else self.block_manager.match_prefix(seq)
            cached = len(prefix) * self.block_manager.block_size
            num_new = min(seq.num_tokens - cached, budget)
            if not self.block_manager.allocate(seq, cached + num_new, prefix, reserve):
                break
            self._admit(self.waiting.popleft(), cached)
            batch.admitted.append(seq)
            batch.grown.append(seq)
            self._append(batch, seq, num_new, cached + num_new == seq.num_tokens)
            budget -= num_new

    def _admit(self, seq: Sequence, num_cached: int) -> None:
        seq.row = self._free_rows.pop()
        seq.status = SequenceStatus.RUNNING
        seq.num_computed_tokens = num_cached
        if seq.num_cached_tokens < 0:
            seq.num_cached_tokens = num_cached
        self.running.append(seq)

    def _append(self, batch: ScheduledBatch, seq: Sequence, num_new: int, reaches_end: bool) -> None:
        # Within a step all keys are stored before any are read, so a prefix may be shared from here on
        if self.block_manager.enable_prefix_caching:
            self.block_manager.commit(seq, min(seq.num_computed_tokens + num_new, seq.num_tokens))
        if reaches_end:
            batch.sampled.append(len(batch.sequences))
        batch.sequences.append(seq)
        batch.num_new_tokens.append(num_new)

    def _release(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        self._free_rows.append(seq.row)
        seq.row = -1
