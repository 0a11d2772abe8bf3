"""A packed decode step arrives where the graph reads it."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from porter.kernels.backend import HAS_TRITON
from porter.kernels.decode_inputs import decode_inputs

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


@pytest.fixture(autouse=True)
def _on_the_gpu_where_there_is_one() -> Iterator[None]:
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@pytest.mark.parametrize(("num_seqs", "width"), [(1, 1), (3, 2), (4, 130)])
def test_arrays_are_spread(num_seqs: int, width: int) -> None:
    rng = np.random.default_rng(0)
    header = np.array([num_seqs, num_seqs, width, num_seqs, num_seqs, 1, 9, num_seqs], dtype=np.int64)
    ids = rng.integers(0, 99, num_seqs)
    ids[0] = -3  # the newest token of row 2
    positions, slots, logits_rows, seeds = rng.integers(0, 2**40, (4, num_seqs))
    rows = rng.permutation(5)[:num_seqs]
    contexts, bounds = rng.integers(1, 99, num_seqs).astype(np.int32), np.arange(num_seqs + 1, dtype=np.int32)
    tables = rng.integers(0, 99, (num_seqs, width)).astype(np.int32)
    temperature = rng.random(num_seqs).astype(np.float32)
    narrow = np.concatenate([contexts, bounds, tables.ravel()])
    narrow = np.concatenate([narrow, np.zeros(len(narrow) % 2, dtype=np.int32)])
    parts = [header, ids, positions, slots, logits_rows, narrow, seeds, rows.astype(np.int64), temperature]
    data = np.concatenate([part.view(np.uint8) for part in parts])
    data = np.concatenate([data, np.zeros(-len(data) % 8, dtype=np.uint8)])
    buffer = torch.from_numpy(data).to(torch.get_default_device())
    long = [torch.full((4,), 7) for _ in range(5)]
    found_ids, found_positions, found_slots, found_seeds, found_rows = long
    found_contexts, found_tables = torch.full((4,), 7, dtype=torch.int32), torch.full((4, 144), 7, dtype=torch.int32)
    found_temperature = torch.full((4,), 7.0)
    last_tokens = torch.tensor([10, 11, 12, 13, 14, 15])
    decode_inputs(
        buffer, last_tokens, found_ids, found_positions, found_slots, found_contexts, found_tables,
        found_seeds, found_rows, found_temperature, 8,
    )  # fmt: skip
    idle = 4 - num_seqs
    assert found_ids.tolist() == [12, *ids[1:].tolist(), *[0] * idle]
    assert found_positions.tolist() == [*positions.tolist(), *[0] * idle]
    assert found_slots.tolist() == [*slots.tolist(), *[-1] * idle]
    assert found_contexts.tolist() == [*contexts.tolist(), *[0] * idle]
    assert found_tables[:num_seqs, :width].tolist() == tables.tolist()
    assert found_seeds.tolist() == [*seeds.tolist(), *[0] * idle]
    assert found_rows.tolist() == [*rows.tolist(), *[5] * idle]
    assert found_temperature[:num_seqs].tolist() == temperature.tolist()
    assert found_temperature[num_seqs:].tolist() == [0.0] * idle
