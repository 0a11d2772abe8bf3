"""Ways to compute the same prompts: in one forward, in chunks, token by token, in mixed batches, over shared blocks."""

from dataclasses import dataclass

import torch

BLOCK_SIZE = 4
_DECODED = 6  # tokens at the end of each prompt that decode schedules compute one by one: more than a block
_CHUNK = 7


@dataclass(frozen=True)
class Part:
    """Tokens `start` to `stop` of a prompt, whose first `stop` tokens have their keys in `blocks`."""

    prompt: int
    start: int
    stop: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One forward: parts of different sequences, laid end to end."""

    parts: tuple[Part, ...]

    @property
    def num_tokens(self) -> int:
        return sum(part.stop - part.start for part in self.parts)


Schedule = tuple[Step, ...]


def whole(prompts: list[list[int]]) -> Schedule:
    """Every prompt whole, in one forward."""
    tables = _tables(prompts)
    return (Step(tuple(_part(i, 0, len(prompt), tables) for i, prompt in enumerate(prompts))),)


def schedules(prompts: list[list[int]], keeps_states: bool = False) -> dict[str, Schedule]:
    """What serving may do instead, by name; of a port with states no prefix is shared."""
    found = {
        "decode": _decoded(prompts),
        "chunks": _chunked(prompts),
        "mixed batches": _mixed(prompts),
        "alone": tuple(Step((part,)) for part in whole(prompts)[0].parts),
        "prefix": _prefix(prompts),
    }
    return {name: steps for name, steps in found.items() if name != "prefix" or not keeps_states}


def _tables(prompts: list[list[int]], seed: int = 0) -> list[tuple[int, ...]]:
    """Blocks for each prompt, in a shuffled order."""
    needed = [-(-len(prompt) // BLOCK_SIZE) for prompt in prompts]
    blocks = torch.split(torch.randperm(sum(needed), generator=torch.Generator().manual_seed(seed)), needed)
    return [tuple(part.tolist()) for part in blocks]


def _part(prompt: int, start: int, stop: int, tables: list[tuple[int, ...]]) -> Part:
    return Part(prompt, start, stop, tables[prompt][: -(-stop // BLOCK_SIZE)])


def _decoded(prompts: list[list[int]]) -> Schedule:
    """All but the last few tokens of each prompt at once, then one token of every sequence a step."""
    tables = _tables(prompts)
    heads = [max(len(prompt) - _DECODED, 1) for prompt in prompts]
    steps = [Step(tuple(_part(i, 0, head, tables) for i, head in enumerate(heads)))]
    for turn in range(_DECODED):
        alive = [i for i, head in enumerate(heads) if head + turn < len(prompts[i])]
        if alive:
            steps.append(Step(tuple(_part(i, heads[i] + turn, heads[i] + turn + 1, tables) for i in alive)))
    return tuple(steps)


def _chunked(prompts: list[list[int]]) -> Schedule:
    """Every prompt in chunks: those of the longest are larger, so that its steps are few."""
    tables = _tables(prompts)
    sizes = [max(_CHUNK, len(prompt) // 4 + 1) for prompt in prompts]
    steps = []
    for turn in range(max(-(-len(prompt) // size) for prompt, size in zip(prompts, sizes, strict=True))):
        bounds = [(i, turn * size, min((turn + 1) * size, len(prompts[i]))) for i, size in enumerate(sizes)]
        steps.append(Step(tuple(_part(i, start, stop, tables) for i, start, stop in bounds if start < stop)))
    return tuple(steps)


def _mixed(prompts: list[list[int]]) -> Schedule:
    """While the first sequences decode, the next ones arrive."""
    tables = _tables(prompts)
    done = [0] * len(prompts)
    steps = []
    for newest in range(len(prompts) + 3):
        bounds = []
        for i in range(min(newest + 1, len(prompts))):
            left = len(prompts[i]) - done[i]
            last = newest == len(prompts) + 2
            size = left if last else max(left - 3, 1) if done[i] == 0 else 1
            if left and size:
                bounds.append((i, done[i], done[i] + min(size, left)))
                done[i] += min(size, left)
        if bounds:
            steps.append(Step(tuple(_part(i, start, stop, tables) for i, start, stop in reversed(bounds))))
    return tuple(steps)


def _prefix(prompts: list[list[int]]) -> Schedule:
    """Every prompt once, then its end again over the full blocks that the first time left, in new blocks."""
    tables = _tables(prompts)
    used = 1 + max(block for table in tables for block in table)
    again = []
    for i, prompt in enumerate(prompts):
        shared = (len(prompt) - 1) // BLOCK_SIZE // 2 + int(len(prompt) > BLOCK_SIZE)
        fresh = tuple(range(used, used + len(tables[i]) - shared))
        used += len(fresh)
        again.append(Part(i, shared * BLOCK_SIZE, len(prompt), tables[i][:shared] + fresh))
    return (*whole(prompts), Step(tuple(again)))
