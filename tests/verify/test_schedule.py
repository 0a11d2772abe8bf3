"""Schedules: each computes every token of every prompt, in order, over blocks that hold what it attends to."""

from hypothesis import given
from hypothesis import strategies as st

from porter.verify.schedule import BLOCK_SIZE, schedules, whole

PROMPTS = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(lambda lengths: [[7] * n for n in lengths])


@given(PROMPTS)
def test_every_schedule_computes_all_tokens_over_what_is_cached(prompts: list[list[int]]) -> None:
    for steps in (whole(prompts), *schedules(prompts).values()):
        held: dict[int, tuple[int, int]] = {}  # slot -> prompt and position whose key it has
        computed = set()
        for step in steps:
            for part in step.parts:
                for position in range(part.start, part.stop):
                    slot = part.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                    held[slot] = (part.prompt, position)
                    computed.add((part.prompt, position))
            for part in step.parts:
                seen = [part.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(part.stop)]
                assert [held.get(slot) for slot in seen] == [(part.prompt, p) for p in range(part.stop)]
        assert computed == {(i, p) for i, prompt in enumerate(prompts) for p in range(len(prompt))}


@given(PROMPTS)
def test_decoding_takes_one_token_of_a_sequence_a_step(prompts: list[list[int]]) -> None:
    first, *rest = schedules(prompts)["decode"]
    assert len(first.parts) == len(prompts)
    assert all(part.stop - part.start == 1 for step in rest for part in step.parts)


def test_a_prefix_is_shared_and_its_rest_goes_elsewhere() -> None:
    once, again = schedules([[7] * 23])["prefix"]
    (before,), (after,) = once.parts, again.parts
    shared = after.start // BLOCK_SIZE
    assert shared > 0
    assert after.blocks[:shared] == before.blocks[:shared]
    assert not set(after.blocks[shared:]) & set(before.blocks)
