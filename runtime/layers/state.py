"""Layers that keep a state of fixed size for each sequence: state spaces, linear attention, short convolutions.

Such a layer computes a sequence from its tokens in order, as its original does: rank 3, batch first. This module brings
it flat tokens: sequences of one step that have equally many new tokens go through it together.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from porter.runtime.deferred import materialize
from porter.runtime.metadata import AttentionMetadata


@dataclass
class States:
    """What the sequences of one call keep, by number: one row for each sequence; empty where they only begin.

    `conv_states[i]` are the last inputs of a convolution [num_seqs, channels, kernel_size], `recurrent_states[i]`
    have whatever shape [num_seqs, ...] the layer gives them. A layer may change them in place.
    """

    has_previous_state: bool = False
    conv_states: dict[int, torch.Tensor] = field(default_factory=dict)
    recurrent_states: dict[int, torch.Tensor] = field(default_factory=dict)

    def update_conv_state(
        self, inputs: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        """Keep the last `conv_kernel_size` of a convolution's inputs [num_seqs, channels, length].

        Returns the inputs with those before them in front: the kept ones, or zeros up to the kernel's size.
        """
        size = inputs.shape[-1] if conv_kernel_size is None else conv_kernel_size
        if self.has_previous_state:
            kept = self.conv_states[state_idx]
            size, inputs = kept.shape[-1], torch.cat([kept, inputs], dim=-1)
        inputs = F.pad(inputs, (max(size - inputs.shape[-1], 0), 0))
        self.conv_states[state_idx] = inputs[..., -size:]
        return inputs

    def update_recurrent_state(self, state: torch.Tensor, state_idx: int = 0) -> torch.Tensor:
        """Keep `state` [num_seqs, ...]."""
        self.recurrent_states[state_idx] = state
        return state


class StateCache:
    """The states of a layer for all running sequences: a slot for each, as many as were needed at once."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, int], torch.Tensor] = {}

    @property
    def slot_bytes(self) -> int:
        """Memory of one slot; 0 before the first sequence."""
        return sum(x[0].numel() * x.element_size() for x in self._tensors.values())

    def load(self, slots: torch.Tensor) -> States:
        """The states in `slots`, int64 [num_seqs]."""
        states = States(has_previous_state=True)
        for (kind, number), tensor in self._tensors.items():
            getattr(states, kind)[number] = tensor.index_select(0, slots)
        return states

    def store(self, slots: torch.Tensor, states: States, num_slots: int) -> None:
        """Put `states` into `slots`, which are below `num_slots`."""
        for kind in ("conv_states", "recurrent_states"):
            for number, rows in getattr(states, kind).items():
                self._room((kind, number), rows, num_slots).index_copy_(0, slots, rows)

    def _room(self, key: tuple[str, int], rows: torch.Tensor, num_slots: int) -> torch.Tensor:
        """The tensor of a state, which doubles when it has too few slots; what is in it stays."""
        known = self._tensors.get(key)
        if known is None or len(known) < num_slots:
            size = num_slots if known is None else max(num_slots, 2 * len(known))
            grown = rows.new_zeros(size, *rows.shape[1:])
            if known is not None:
                grown[: len(known)] = known
            self._tensors[key] = known = grown
        return known


@dataclass(frozen=True)
class _Group:
    """Sequences of a step with equally many new tokens: `rows` [num_seqs, length] of the step, `slots` [num_seqs]."""

    rows: torch.Tensor
    slots: torch.Tensor
    num_slots: int
    continues: bool


class StateMixer(nn.Module, ABC):
    """A layer from tokens [num_tokens, hidden_size] to tokens, each of which depends on its sequence's earlier ones.

    `resumes` says that `mix` takes a given state into account with any number of tokens; without it, sequences that
    have a state go on token by token.
    """

    resumes: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.state_cache = StateCache()

    @abstractmethod
    def mix(self, hidden_states: torch.Tensor, states: States) -> torch.Tensor:
        """From [num_seqs, length, hidden_size] to the same, with `states` brought from before these tokens to after."""

    def forward(self, hidden_states: torch.Tensor, attn_metadata: AttentionMetadata) -> torch.Tensor:
        """One step's tokens [num_tokens, hidden_size]."""
        hidden_states = materialize(hidden_states)
        output = torch.empty_like(hidden_states)
        for group in attn_metadata.once("sequences by length", lambda: list(_groups(attn_metadata))):
            output[group.rows] = self._mix_group(hidden_states[group.rows], group).to(output.dtype)
        return output

    def _mix_group(self, hidden_states: torch.Tensor, group: _Group) -> torch.Tensor:
        if not group.continues or self.resumes or hidden_states.shape[1] == 1:
            return self._mix_and_store(hidden_states, group)
        return torch.cat([self._mix_and_store(token, group) for token in torch.split(hidden_states, 1, dim=1)], dim=1)

    def _mix_and_store(self, hidden_states: torch.Tensor, group: _Group) -> torch.Tensor:
        states = self.state_cache.load(group.slots) if group.continues else States()
        output = self.mix(hidden_states, states)
        self.state_cache.store(group.slots, states, group.num_slots)
        return output


def keeps_states(model: nn.Module) -> bool:
    """Whether a model has layers with states, which later sequences can't share as they share a prefix's blocks."""
    return any(isinstance(module, StateMixer) for module in model.modules())


def state_bytes(model: nn.Module) -> int:
    """Memory of one sequence's states in all layers; 0 before the first sequence."""
    return sum(module.state_cache.slot_bytes for module in model.modules() if isinstance(module, StateMixer))


def _groups(metadata: AttentionMetadata) -> Iterator[_Group]:
    starts: list[int] = metadata.cu_seqlens_q.tolist()
    context_lens: list[int] = metadata.context_lens.tolist()
    slots: list[int] = metadata.state_slots.tolist()
    members: dict[tuple[int, bool], list[int]] = {}
    for i, (start, end) in enumerate(pairwise(starts)):
        if end > start:
            members.setdefault((end - start, context_lens[i] > end - start), []).append(i)
    device = metadata.cu_seqlens_q.device
    for (length, continues), seqs in members.items():
        first = torch.tensor([starts[i] for i in seqs], device=device)
        rows = first[:, None] + torch.arange(length, device=device)
        yield _Group(rows, torch.tensor([slots[i] for i in seqs], device=device), max(slots) + 1, continues)
