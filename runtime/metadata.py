"""What attention must know about one step: where keys and values go and which of them each token sees."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass
class AttentionMetadata:
    """One step's batch: the new tokens of num_seqs sequences, laid end to end in num_tokens rows."""

    slot_mapping: torch.Tensor  # int64 [num_tokens]; block id * block_size + offset, -1 = don't store
    block_tables: torch.Tensor  # int32 [num_seqs, max_blocks]; padding is never read
    context_lens: torch.Tensor  # int32 [num_seqs]; visible tokens, the new ones included
    cu_seqlens_q: torch.Tensor  # int32 [num_seqs + 1]; where each sequence's new tokens begin
    max_seqlen_q: int
    max_context_len: int
    num_decodes: int = 0  # so many sequences, at least, from the first on have one new token
    state_slots: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # int64 [num_seqs]
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), computed by the first layer that asks for `key` in this step and shared by the others."""
        try:
            value: T = self._memo[key]
        except KeyError:
            value = self._memo[key] = make()
        return value

    @classmethod
    def for_sequences(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str | None = None,
        state_slots: Sequence[int] | None = None,
    ) -> "AttentionMetadata":
        """The step that runs the last query_lens[i] of sequence i's context_lens[i] tokens.

        block_tables[i] holds at least ceil(context_lens[i] / block_size) block ids. Layers with states keep those of
        sequence i in state_slots[i], by default i.
        """
        slots = [
            table[position // block_size] * block_size + position % block_size
            for count, context, table in zip(query_lens, context_lens, block_tables, strict=True)
            for position in range(context - count, context)
        ]
        width = max((len(table) for table in block_tables), default=0)
        padded = [[*table, *[0] * (width - len(table))] for table in block_tables]
        return cls(
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            block_tables=torch.tensor(padded, dtype=torch.int32, device=device).view(len(padded), width),
            context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
            cu_seqlens_q=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32, device=device),
            max_seqlen_q=max(query_lens, default=0),
            max_context_len=max(context_lens, default=0),
            num_decodes=len(list(takewhile(lambda count: count == 1, query_lens))),
            state_slots=torch.tensor(
                range(len(query_lens)) if state_slots is None else state_slots, dtype=torch.int64, device=device
            ),
        )
