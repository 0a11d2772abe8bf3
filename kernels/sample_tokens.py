"""One token a row, greedily or at a temperature: argmax of logits / temperature + Gumbel noise, in one pass."""

from typing import Any

import torch

from porter.kernels.backend import tl, triton

_BLOCK = 4096

CASES: list[dict[str, Any]] = [
    {"num_rows": 1, "vocab_size": 50},
    {"num_rows": 5, "vocab_size": 9001},
]


@triton.jit
def _waiting_time(uniform):  # type: ignore[no-untyped-def]
    """-log(1 - u), exponentially distributed; the series keeps the small ones exact, which are those that win."""
    uniform = tl.maximum(uniform, 1e-10)
    return tl.where(uniform < 1e-3, uniform * (1.0 + 0.5 * uniform), -tl.log(1.0 - uniform))


@triton.jit  # type: ignore[untyped-decorator]
def _best_of_block_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, temperature_ptr, seeds_ptr, best_ptr, index_ptr, stride_logits, vocab_size, num_blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    quarter: tl.constexpr = BLOCK // 4
    lanes = tl.arange(0, quarter)
    temperature = tl.load(temperature_ptr + row)
    zeros = tl.zeros([quarter], tl.float32)
    first, second, third, fourth = zeros, zeros, zeros, zeros
    if temperature > 0:
        # one draw of the generator is four numbers
        first, second, third, fourth = tl.rand4x(tl.load(seeds_ptr + row), tl.program_id(1) * quarter + lanes)
    best = tl.full([quarter], float("-inf"), tl.float32)
    index = tl.zeros([quarter], tl.int32)
    for i in tl.static_range(4):
        uniform = (first, second, third, fourth)[i]
        tokens = tl.program_id(1) * BLOCK + i * quarter + lanes
        inside = tokens < vocab_size
        # masked lanes hold -inf and are never the best
        scores = tl.load(logits_ptr + row * stride_logits + tokens, mask=inside, other=float("-inf")).to(tl.float32)
        if temperature > 0:
            scores = scores / temperature - tl.log(_waiting_time(uniform))
        index = tl.where(scores > best, tokens, index)
        best = tl.maximum(best, scores)
    highest = tl.max(best, 0)
    place = row * num_blocks + tl.program_id(1)
    tl.store(best_ptr + place, highest)
    tl.store(index_ptr + place, tl.min(tl.where(best == highest, index, 2147483647), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _best_block_kernel(  # type: ignore[no-untyped-def]
    best_ptr, index_ptr, out_ptr, num_blocks, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCK)
    # masked lanes hold -inf and are never the best
    best = tl.load(best_ptr + row * num_blocks + blocks, mask=blocks < num_blocks, other=float("-inf"))
    _, winner = tl.max(best, 0, return_indices=True)
    tl.store(out_ptr + row, tl.load(index_ptr + row * num_blocks + winner).to(tl.int64))


def sample_tokens(logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """logits `[n, vocab]`, temperature float32 `[n]` (0 = greedy), seeds int64 `[n]` -> token ids int64 `[n]`.

    A row's token depends on its own logits, temperature and seed alone. Exact: adding Gumbel noise to logits and taking
    the largest draws from their softmax (Gumbel 1954).
    """
    num_rows, vocab_size = logits.shape
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    best = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)
    index = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=logits.device)
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        _best_of_block_kernel[(num_rows, num_blocks)](
            logits, temperature, seeds, best, index, logits.stride(0), vocab_size, num_blocks, BLOCK=_BLOCK, num_warps=8
        )  # fmt: skip
        _best_block_kernel[(num_rows,)](best, index, out, num_blocks, BLOCK=triton.next_power_of_2(num_blocks))
    return out
