"""A sequence: one prompt and one of its samples, with its place in the KV cache. No tensors."""

from dataclasses import dataclass, field
from enum import Enum

from porter.runtime.sampling import SamplingParams
from porter.runtime.structured_outputs import Matcher


class SequenceStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """State of one sample while it is served.

    `index` counts the n samples of a request, `seed` drives its random numbers, `stop_ids` are token ids that end it.
    `block_table` holds block ids, `block_hashes` the prefix hashes of its full blocks as far as known, and `row` its
    row in the batch arrays while it runs. `num_computed_tokens` tokens have their keys and values in the cache;
    `num_cached_tokens` of them came from a shared prefix when it first ran, -1 before that.
    `num_in_flight` tokens are being sampled by a step that still runs; `max_length` counts prompt and output.
    `num_committed` tokens lie in blocks whose prefix others may share.
    `num_prompt_logprobs` are wanted for each prompt token (None: not at all), and done for the first few. `matcher`
    holds the output to a form.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    index: int = 0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    output_token_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = -1
    num_in_flight: int = 0
    num_committed: int = 0
    max_length: int = 2**62
    num_prompt_logprobs: int | None = None
    num_prompt_logprobs_done: int = 0
    matcher: Matcher | None = None
    row: int = -1
    status: SequenceStatus = SequenceStatus.WAITING

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_output(self) -> int:
        """Tokens of the output, those in flight included."""
        return len(self.output_token_ids) + self.num_in_flight

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids `start` to `stop` of the prompt followed by the output."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        output = self.output_token_ids[max(start - num_prompt, 0) : stop - num_prompt]
        return self.prompt_token_ids[start:] + output if start < num_prompt else output
