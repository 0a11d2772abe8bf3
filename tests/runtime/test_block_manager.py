"""Blocks: never both free and used, counts balance, prefixes are shared and evicted in order."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from porter.runtime.block_manager import BlockManager
from porter.runtime.sampling import SamplingParams
from porter.runtime.sequence import Sequence


def sequence(tokens: list[int]) -> Sequence:
    return Sequence("request", tokens, SamplingParams())


def fill(manager: BlockManager, seq: Sequence) -> list[int]:
    prefix = manager.match_prefix(seq)
    assert manager.allocate(seq, seq.num_tokens, prefix)
    seq.num_computed_tokens = len(prefix) * manager.block_size
    manager.commit(seq, seq.num_tokens)
    seq.num_computed_tokens = seq.num_tokens
    return prefix


def test_equal_prefixes_share_full_blocks() -> None:
    manager = BlockManager(8, 4)
    first, second = sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]), sequence([1, 2, 3, 4, 5, 6, 7, 0, 9])
    fill(manager, first)
    assert fill(manager, second) == first.block_table[:1]
    assert manager.num_free_blocks == 3


def test_the_last_token_is_always_left_to_compute() -> None:
    manager = BlockManager(8, 4)
    first, second = sequence([1, 2, 3, 4]), sequence([1, 2, 3, 4])
    fill(manager, first)
    assert manager.match_prefix(second) == []


def test_a_block_is_only_shared_behind_its_own_prefix() -> None:
    manager = BlockManager(8, 2)
    fill(manager, sequence([1, 2, 3, 4, 5]))
    assert manager.match_prefix(sequence([9, 9, 3, 4, 5])) == []


def test_freed_prefixes_are_taken_back() -> None:
    manager = BlockManager(4, 4)
    first, second = sequence(list(range(9))), sequence(list(range(9)))
    fill(manager, first)
    table = first.block_table[:2]
    manager.free(first)
    assert manager.num_free_blocks == 4
    assert fill(manager, second) == table


def test_the_oldest_free_prefix_is_evicted_first() -> None:
    manager = BlockManager(2, 2)
    old, new, other = sequence([1, 1, 0]), sequence([2, 2, 0]), sequence([3])
    for seq in (old, new):
        manager.allocate(seq, 2)
        manager.commit(seq, 2)
    manager.free(old)
    manager.free(new)
    manager.allocate(other, 1)
    assert manager.match_prefix(sequence([1, 1, 0])) == []
    assert len(manager.match_prefix(sequence([2, 2, 0]))) == 1


def test_a_refused_allocation_changes_nothing() -> None:
    manager = BlockManager(2, 2)
    seq = sequence([1, 2, 3, 4, 5])
    assert not manager.allocate(seq, 5)
    assert seq.block_table == []
    assert manager.num_free_blocks == 2


def test_without_prefix_caching_nothing_is_shared() -> None:
    manager = BlockManager(8, 2, enable_prefix_caching=False)
    fill(manager, sequence([1, 2, 3]))
    assert manager.match_prefix(sequence([1, 2, 3])) == []


def test_reset_forgets_prefixes() -> None:
    manager = BlockManager(8, 2)
    seq = sequence([1, 2, 3])
    fill(manager, seq)
    manager.reset_prefix_cache()
    manager.check_integrity([seq])
    assert manager.match_prefix(sequence([1, 2, 3])) == []


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences come, grow and go in any order; a model of what each block holds checks the sharing."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(num_blocks=7, block_size=2)
        self.live: list[Sequence] = []
        self.contents: dict[int, list[int]] = {}

    def store(self, seq: Sequence, start: int) -> None:
        size = self.manager.block_size
        for i in range(start // size, len(seq.block_table)):
            self.contents[seq.block_table[i]] = seq.tokens(0, (i + 1) * size)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def add(self, tokens: list[int]) -> None:
        seq = sequence(tokens)
        prefix = self.manager.match_prefix(seq)
        cached = len(prefix) * self.manager.block_size
        assert cached < seq.num_tokens
        for i, block in enumerate(prefix):
            assert self.contents[block] == tokens[: (i + 1) * self.manager.block_size]
        if self.manager.allocate(seq, seq.num_tokens, prefix):
            seq.num_computed_tokens = cached
            self.store(seq, cached)
            self.manager.commit(seq, seq.num_tokens)
            seq.num_computed_tokens = seq.num_tokens
            self.live.append(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: Any, token: int) -> None:
        seq = data.draw(st.sampled_from(self.live))
        if self.manager.allocate(seq, seq.num_tokens + 1):
            seq.output_token_ids.append(token)
            self.store(seq, seq.num_tokens - 1)
            self.manager.commit(seq, seq.num_tokens)
            seq.num_computed_tokens = seq.num_tokens

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        seq = data.draw(st.sampled_from(self.live))
        self.live.remove(seq)
        self.manager.free(seq)

    @invariant()
    def holds_together(self) -> None:
        self.manager.check_integrity(self.live)

    @invariant()
    def running_sequences_find_their_own_tokens(self) -> None:
        size = self.manager.block_size
        for seq in self.live:
            for i, block in enumerate(seq.block_table):
                assert self.contents[block] == seq.tokens(0, (i + 1) * size)


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
