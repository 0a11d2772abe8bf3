"""Spreads a decode step's packed arrays over the fixed places where a CUDA graph reads them."""

import torch

from porter.kernels.backend import tl, triton


@triton.jit  # type: ignore[untyped-decorator]
def _decode_inputs_kernel(  # type: ignore[no-untyped-def]
    wide_ptr, narrow_ptr, last_tokens_ptr,
    input_ids_ptr, positions_ptr, slot_mapping_ptr, context_lens_ptr, block_tables_ptr,
    seeds_ptr, rows_ptr, temperature_ptr,
    spare_row, stride_table, HEADER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program a row of the graph. The buffer is read as int64 and as int32.
    row = tl.program_id(0)
    num_seqs = tl.load(wide_ptr + 1)
    width = tl.load(wide_ptr + 2)
    live = row < num_seqs
    # rows without a sequence: token 0 at position 0, stored nowhere, with nothing to see, sampled into a spare place
    token = tl.load(wide_ptr + HEADER + row, mask=live, other=0)
    if token < 0:
        token = tl.load(last_tokens_ptr - token - 1)
    tl.store(input_ids_ptr + row, token)
    tl.store(positions_ptr + row, tl.load(wide_ptr + HEADER + num_seqs + row, mask=live, other=0))
    tl.store(slot_mapping_ptr + row, tl.load(wide_ptr + HEADER + 2 * num_seqs + row, mask=live, other=-1))
    narrow = narrow_ptr + 2 * (HEADER + 4 * num_seqs)
    tl.store(context_lens_ptr + row, tl.load(narrow + row, mask=live, other=0))
    tables = narrow + 2 * num_seqs + 1
    if live:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            blocks = tl.load(tables + row * width + columns, mask=inside, other=0)
            tl.store(block_tables_ptr + row.to(tl.int64) * stride_table + columns, blocks, mask=inside)
    # the sampling arrays begin at the next multiple of 8 bytes
    sampling = HEADER + 4 * num_seqs + (2 * num_seqs + 1 + num_seqs * width + 1) // 2
    tl.store(seeds_ptr + row, tl.load(wide_ptr + sampling + row, mask=live, other=0))
    tl.store(rows_ptr + row, tl.load(wide_ptr + sampling + num_seqs + row, mask=live, other=spare_row))
    temperature = tl.load(narrow_ptr + 2 * (sampling + 2 * num_seqs) + row, mask=live, other=0)
    tl.store(temperature_ptr + row, temperature.to(tl.float32, bitcast=True))


def decode_inputs(
    buffer: torch.Tensor,
    last_tokens: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    seeds: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    header: int,
) -> None:
    """Fill the arrays `[n]` (block_tables `[n, max_blocks]`) from a packed step of at most n sequences.

    buffer (uint8): `header` int64 fields (the second: the number of sequences s, the third: the tables' width w); int64
    input ids, positions, slots and logits rows, `[s]` each; int32 context lengths `[s]`, bounds `[s + 1]` and block
    tables `[s, w]`; from the next multiple of 8 bytes on int64 seeds and rows, float32 temperatures, `[s]` each.
    An input id of -(r + 1) stands for last_tokens[r]. Rows from s on get inputs without effect.
    """
    _decode_inputs_kernel[(len(input_ids),)](
        buffer.view(torch.int64), buffer.view(torch.int32), last_tokens,
        input_ids, positions, slot_mapping, context_lens, block_tables, seeds, rows, temperature,
        len(last_tokens) - 1, block_tables.stride(0), HEADER=header, BLOCK=128, num_warps=1,
    )  # fmt: skip
