"""What is measured: prompts of random tokens and how many tokens each gets, the same for every engine."""

import random
import re
from dataclasses import asdict, dataclass
from typing import Any

from porter.errors import UsageError


@dataclass(frozen=True)
class Workload:
    """`num_prompts` prompts; lengths are drawn evenly from the ranges, both ends included."""

    num_prompts: int
    input_len: tuple[int, int]
    output_len: tuple[int, int]
    temperature: float
    seed: int

    @property
    def longest(self) -> int:
        """Tokens of the longest possible prompt with its output."""
        return self.input_len[1] + self.output_len[1]

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt tokens, output tokens) of each request."""
        rng = random.Random(self.seed)
        return [(rng.randint(*self.input_len), rng.randint(*self.output_len)) for _ in range(self.num_prompts)]

    def order(self, **changes: Any) -> dict[str, Any]:
        """What a side is told to run."""
        inputs, outputs = zip(*self.lengths(), strict=True)
        told = {"inputs": inputs, "outputs": outputs, "temperature": self.temperature, "seed": self.seed}
        return told | changes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_range(text: str, name: str) -> tuple[int, int]:
    """`100` or `100:1024`; raises UsageError."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UsageError(f"{name} {text!r} is not a length", "give a number, or two as in 100:1024")
    return low, high
