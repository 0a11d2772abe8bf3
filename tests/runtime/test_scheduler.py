"""The scheduler: budgets are kept, everyone finishes, nobody loses a token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.runtime.block_manager import BlockManager
from porter.runtime.sampling import SamplingParams
from porter.runtime.scheduler import ScheduledBatch, Scheduler
from porter.runtime.sequence import Sequence, SequenceStatus


def sequence(length: int, first: int = 0) -> Sequence:
    return Sequence("request", [first + i for i in range(length)], SamplingParams())


def make(num_blocks: int = 32, block_size: int = 4, max_num_seqs: int = 4, budget: int = 16) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size), max_num_seqs, budget)


def run(scheduler: Scheduler, batch: ScheduledBatch, token: int = 99) -> None:
    for i in scheduler.mark_computed(batch):
        batch.sequences[i].output_token_ids.append(token)


def test_a_long_prompt_is_cut_into_chunks() -> None:
    scheduler = make(budget=6)
    scheduler.add(sequence(14))
    chunks = []
    for _ in range(3):
        batch = scheduler.schedule()
        chunks.append(batch.num_new_tokens)
        run(scheduler, batch)
    assert chunks == [[6], [6], [2]]


def test_decodes_go_before_prompts() -> None:
    scheduler = make(budget=6)
    first, second = sequence(3), sequence(9, first=50)
    scheduler.add(first)
    run(scheduler, scheduler.schedule())
    scheduler.add(second)
    batch = scheduler.schedule()
    assert batch.sequences == [first, second]
    assert batch.num_new_tokens == [1, 5]


def test_no_more_sequences_than_rows() -> None:
    scheduler = make(max_num_seqs=2)
    for i in range(3):
        scheduler.add(sequence(2, first=10 * i))
    assert len(scheduler.schedule().sequences) == 2
    assert len(scheduler.waiting) == 1


def test_the_newest_sequence_is_preempted_and_resumes_with_its_output() -> None:
    scheduler = make(num_blocks=4, block_size=2)
    first, second = sequence(3), sequence(3, first=50)
    scheduler.add(first)
    scheduler.add(second)
    while not scheduler.num_preemptions:
        batch = scheduler.schedule()
        run(scheduler, batch)
    assert batch.preempted == [second]
    assert second.status is SequenceStatus.WAITING
    assert second.block_table == []
    produced = list(second.output_token_ids)
    scheduler.finish(first)
    batch = scheduler.schedule()
    assert batch.sequences == [second]
    assert second.num_computed_tokens + batch.num_new_tokens[0] == 3 + len(produced)


def test_an_equal_prompt_in_the_same_step_shares_blocks() -> None:
    scheduler = make(block_size=4, budget=32)
    first, second = sequence(9), sequence(9)
    scheduler.add(first)
    scheduler.add(second)
    batch = scheduler.schedule()
    assert batch.num_new_tokens == [9, 1]
    assert second.num_cached_tokens == 8


def test_prompt_logprobs_compute_the_whole_prompt() -> None:
    scheduler = make(block_size=4, budget=32)
    first, second = sequence(9), sequence(9)
    second.num_prompt_logprobs = 0
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.schedule().num_new_tokens == [9, 9]


@pytest.mark.parametrize("started", [False, True])
def test_finish_gives_everything_back(started: bool) -> None:
    scheduler = make()
    seq = sequence(5)
    scheduler.add(seq)
    if started:
        scheduler.schedule()
    scheduler.finish(seq)
    assert not scheduler.has_unfinished()
    assert scheduler.block_manager.num_free_blocks == 32


@settings(max_examples=80, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(1, 8)), min_size=1, max_size=8
    ),
    num_blocks=st.integers(10, 16),
    max_num_seqs=st.integers(1, 4),
    budget=st.integers(1, 9),
)
def test_everyone_finishes_within_the_budgets(
    prompts: list[tuple[list[int], int]], num_blocks: int, max_num_seqs: int, budget: int
) -> None:
    scheduler = make(num_blocks, 2, max_num_seqs, budget)
    wanted = {}
    for i, (tokens, length) in enumerate(prompts):
        seq = Sequence(str(i), tokens, SamplingParams())
        wanted[seq] = length
        scheduler.add(seq)
    for _ in range(2000):
        if not scheduler.has_unfinished():
            break
        batch = scheduler.schedule()
        check_step(scheduler, batch)
        run(scheduler, batch, token=1)
        for seq in batch.sequences:
            if len(seq.output_token_ids) == wanted[seq]:
                scheduler.finish(seq)
    assert {seq: len(seq.output_token_ids) for seq in wanted} == wanted
    assert scheduler.block_manager.num_free_blocks == num_blocks


def check_step(scheduler: Scheduler, batch: ScheduledBatch) -> None:
    manager = scheduler.block_manager
    assert batch.sequences, "no progress"
    assert batch.num_tokens <= scheduler.max_num_batched_tokens
    assert min(batch.num_new_tokens) >= 1
    assert len(scheduler.running) <= scheduler.max_num_seqs
    assert len({seq.row for seq in scheduler.running}) == len(scheduler.running)
    assert not set(batch.sequences) & set(batch.preempted)
    manager.check_integrity(scheduler.running)
    for seq, num_new in zip(batch.sequences, batch.num_new_tokens, strict=True):
        assert seq.num_computed_tokens + num_new <= seq.num_tokens
        assert seq.num_computed_tokens + num_new <= len(seq.block_table) * manager.block_size
