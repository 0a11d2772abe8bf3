"""The arrays of a step: kept on the host per row, cut out for each step, sent as one buffer."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from porter.runtime.metadata import AttentionMetadata
from porter.runtime.sampling_batch import PlainSampling, mix
from porter.runtime.scheduler import ScheduledBatch

IntArray = npt.NDArray[np.int64]

HEADER_FIELDS = 8  # number of int64 fields before the arrays


@dataclass(frozen=True)
class StepInput:
    """What the model needs of a step, on the device.

    `logits_rows` are the tokens whose logits are wanted: the first `num_sampled` to sample from, the others for
    prompt logprobs.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    attn_metadata: AttentionMetadata
    logits_rows: torch.Tensor
    num_sampled: int


def unpack(buffer: torch.Tensor, device: torch.device) -> StepInput:
    """The step in a buffer (uint8, on the host) made by `BatchArrays.pack`; one copy to the device."""
    header = buffer[: HEADER_FIELDS * 8].view(torch.int64).tolist()
    num_tokens, num_seqs, max_blocks, num_rows, num_sampled, max_seqlen_q, max_context_len, num_decodes = header
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    data = buffer[HEADER_FIELDS * 8 :].to(device, non_blocking=True)
    split = 8 * (3 * num_tokens + num_rows)
    wide, narrow = data[:split].view(torch.int64), data[split:].view(torch.int32)
    input_ids, positions, slot_mapping, logits_rows = torch.split(wide, [num_tokens, num_tokens, num_tokens, num_rows])
    sizes = [num_seqs, num_seqs + 1, num_seqs * max_blocks]
    context_lens, cu_seqlens_q, tables, state_slots = torch.split(narrow, [*sizes, len(narrow) - sum(sizes)])
    metadata = AttentionMetadata(
        slot_mapping=slot_mapping,
        block_tables=tables.view(num_seqs, max_blocks),
        context_lens=context_lens,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        max_context_len=max_context_len,
        num_decodes=num_decodes,
        state_slots=state_slots.long(),
    )
    return StepInput(input_ids, positions, metadata, logits_rows, num_sampled)


def is_decode(buffer: npt.NDArray[np.uint8]) -> bool:
    """Whether a packed step is one new token, and its sampling, for each sequence."""
    num_tokens, num_seqs, _, num_rows, num_sampled, *_ = buffer[: HEADER_FIELDS * 8].view(np.int64).tolist()
    return bool(num_tokens == num_seqs == num_rows == num_sampled)


class BatchArrays:
    """Token ids and block tables of the running sequences, one row each, so that a step is cut out by indexing."""

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        table_multiple: int = 1,
        keeps_states: bool = False,
    ) -> None:
        """table_multiple: block tables are padded to such a multiple of columns. keeps_states: steps say which slot the
        states of each sequence have, which is its row."""
        self.block_size = block_size
        self._table_multiple = table_multiple
        self._keeps_states = keeps_states
        self._token_ids = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self._num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._block_tables = np.zeros((max_num_seqs, -(-max_model_len // block_size) + table_multiple), dtype=np.int32)
        self._num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self._seeds = np.zeros(max_num_seqs, dtype=np.uint64)
        self._num_prompt = np.zeros(max_num_seqs, dtype=np.int64)
        self._temperature = np.zeros(max_num_seqs, dtype=np.float32)

    def sync(self, batch: ScheduledBatch) -> None:
        """Take over what scheduling changed: new sequences and new blocks."""
        for seq in batch.admitted:
            tokens = seq.tokens(0, seq.num_tokens)
            self._token_ids[seq.row, : len(tokens)] = tokens
            self._num_tokens[seq.row] = len(tokens)
            self._num_blocks[seq.row] = 0
            self._seeds[seq.row] = seq.seed
            self._num_prompt[seq.row] = len(seq.prompt_token_ids)
            self._temperature[seq.row] = seq.params.temperature
        for seq in batch.grown:
            known = self._num_blocks[seq.row]
            self._block_tables[seq.row, known : len(seq.block_table)] = seq.block_table[known:]
            self._num_blocks[seq.row] = len(seq.block_table)

    def append(self, rows: Seq[int], token_ids: Seq[int]) -> None:
        """Add one sampled token to each of `rows`."""
        index = np.asarray(rows, dtype=np.int64)
        self._token_ids[index, self._num_tokens[index]] = token_ids
        self._num_tokens[index] += 1

    def plain_sampling(self, batch: ScheduledBatch) -> PlainSampling:
        """What the sampled sequences of a step need that is about to be launched."""
        rows = np.array([batch.sequences[i].row for i in batch.sampled], dtype=np.int64)
        lengths = [batch.sequences[i].num_computed_tokens + batch.num_new_tokens[i] for i in batch.sampled]
        steps = np.array(lengths, dtype=np.int64) - self._num_prompt[rows]
        bits = mix(self._seeds[rows], steps.astype(np.uint64))
        return PlainSampling(rows, bits.view(np.int64), self._temperature[rows])

    def next_tokens(self, row: int, start: int, stop: int) -> IntArray:
        """Token ids `start` to `stop` of a row."""
        return self._token_ids[row, start:stop].astype(np.int64)

    def pack(self, batch: ScheduledBatch, sampled: IntArray, prompt_rows: IntArray) -> npt.NDArray[np.uint8]:
        """The step as one buffer: `sampled` are places in the batch, `prompt_rows` places among the step's tokens.

        A token that is still being sampled goes in as -(row + 1).
        """
        rows = np.array([seq.row for seq in batch.sequences], dtype=np.int64)
        computed = np.array([seq.num_computed_tokens for seq in batch.sequences], dtype=np.int64)
        num_new = np.array(batch.num_new_tokens, dtype=np.int64)
        context_lens = computed + num_new
        cu_seqlens = np.concatenate(([0], np.cumsum(num_new)))
        positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1] - computed, num_new)
        token_rows = np.repeat(rows, num_new)
        blocks = self._block_tables[token_rows, positions // self.block_size].astype(np.int64)
        max_blocks = -(-int(context_lens.max()) // self.block_size)
        max_blocks = -(-max_blocks // self._table_multiple) * self._table_multiple
        num_decodes = int((num_new != 1).argmax()) if (num_new != 1).any() else len(rows)
        header = (len(positions), len(rows), max_blocks, len(sampled) + len(prompt_rows), len(sampled))
        known = positions < self._num_tokens[token_rows]
        wide = (
            (*header, int(num_new.max()), int(context_lens.max()), num_decodes),
            np.where(known, self._token_ids[token_rows, positions], -token_rows - 1),
            positions,
            blocks * self.block_size + positions % self.block_size,
            cu_seqlens[1:][sampled] - 1,
            prompt_rows,
        )
        narrow = [context_lens, cu_seqlens, self._block_tables[rows, :max_blocks].ravel()]
        narrow += [rows] * self._keeps_states
        return np.concatenate(
            [np.concatenate(wide, dtype=np.int64).view(np.uint8), np.concatenate(narrow, dtype=np.int32).view(np.uint8)]
        )
