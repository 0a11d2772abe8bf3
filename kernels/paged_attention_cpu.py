"""The CPU path of paged_attention: decoding sequences in batches, each prefill alone, GQA without copies of K and V."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F


@dataclass
class Group:
    """Sequences with one query length, attended to together.

    Whole blocks are read, so the cache must hold finite numbers where nothing was stored: a masked NaN is still NaN.
    """

    rows: torch.Tensor | slice  # of the step's tokens, sequence after sequence
    query_len: int
    blocks: torch.Tensor  # int64 [num_seqs, num_blocks]; those that hold visible keys, the last one again as padding
    adjacent: bool  # one sequence whose blocks follow each other: no copy is needed
    offset: int  # of the first key in its block; 0 for several sequences
    num_keys: int  # of each sequence, masked ones included
    starts: torch.Tensor  # int64 [num_seqs]; the position of each sequence's first key
    mask: torch.Tensor | None  # float32 [num_seqs, 1, query_len, num_keys]: 0 or -inf; None: see `causal`
    causal: bool  # every key is also a query, so a plain causal triangle does
    _masks: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)
    _space: torch.Tensor | None = None
    _index: torch.Tensor | None = None

    def mask_in(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask in the scores' dtype."""
        if self.mask is None or self.mask.dtype == dtype:
            return self.mask
        if dtype not in self._masks:
            self._masks[dtype] = self.mask.to(dtype)
        return self._masks[dtype]

    def gather(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[num_seqs, kv_heads, num_keys, head_dim]`."""
        num_seqs, num_blocks = self.blocks.shape
        if self.adjacent:
            first = int(self.blocks[0, 0])
            found = kv_cache[:, first : first + num_blocks]
        else:
            found = self._copy(kv_cache)
        found = found.view(2, num_seqs, -1, *kv_cache.shape[3:])[:, :, self.offset : self.offset + self.num_keys]
        return found[0].transpose(1, 2), found[1].transpose(1, 2)

    def _copy(self, kv_cache: torch.Tensor) -> torch.Tensor:
        source = kv_cache.view(2 * kv_cache.shape[1], -1)
        if self._index is None:
            self._index = torch.cat((self.blocks.flatten(), self.blocks.flatten() + kv_cache.shape[1]))
        if self._space is None or self._space.dtype != source.dtype or self._space.shape[1] != source.shape[1]:
            # kept for the step's other layers, whose copies then stay in the processor's cache
            self._space = torch.empty(self._index.shape[0], source.shape[1], dtype=source.dtype)
        return torch.index_select(source, 0, self._index, out=self._space)


@dataclass
class CpuPlan:
    """How one step is attended to by all layers with the same window."""

    groups: list[Group]
    num_tokens: int

    @cached_property
    def key_positions(self) -> list[torch.Tensor]:
        """Per group, int64 `[num_seqs, num_keys]`."""
        return [group.starts[:, None] + torch.arange(group.num_keys) for group in self.groups]

    @classmethod
    def make(
        cls,
        block_tables: torch.Tensor,
        context_lens: Sequence[int],
        cu_seqlens_q: Sequence[int],
        block_size: int,
        window: int | None,
    ) -> "CpuPlan":
        """Decoding sequences of similar length share a group, prefills have their own."""
        builder = _Builder(block_tables.long(), context_lens, cu_seqlens_q, block_size, window)
        query_lens = [end - start for start, end in pairwise(cu_seqlens_q)]
        groups = [builder.group([i]) for i, length in enumerate(query_lens) if length > 1]
        decoding = [i for i, length in enumerate(query_lens) if length == 1]
        groups += [builder.group(members) for members in _similar(decoding, builder.num_keys)]
        return cls(groups, cu_seqlens_q[-1])


def _similar(sequences: list[int], num_keys: Sequence[int]) -> list[list[int]]:
    """Groups in which at least half of the padded keys are real; all in one if that holds."""
    if sequences and 2 * sum(num_keys[i] for i in sequences) >= len(sequences) * max(num_keys[i] for i in sequences):
        return [sequences]
    groups: list[list[int]] = []
    for i in sorted(sequences, key=lambda i: -num_keys[i]):
        if groups and num_keys[i] * 2 >= num_keys[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


class _Builder:
    def __init__(
        self,
        block_tables: torch.Tensor,
        context_lens: Sequence[int],
        cu_seqlens_q: Sequence[int],
        block_size: int,
        window: int | None,
    ) -> None:
        self.block_tables = block_tables
        self.context_lens = context_lens
        self.bounds = cu_seqlens_q
        self.block_size = block_size
        self.window = window
        query_lens = [end - start for start, end in pairwise(cu_seqlens_q)]
        self.num_keys = [
            min(context, window + length - 1) if window else context
            for context, length in zip(context_lens, query_lens, strict=True)
        ]

    def group(self, members: list[int]) -> Group:
        contexts = torch.tensor([self.context_lens[i] for i in members])
        starts = contexts - torch.tensor([self.num_keys[i] for i in members])
        offset = 0
        if len(members) == 1:
            offset = int(starts[0]) % self.block_size
        else:
            starts = starts // self.block_size * self.block_size
        num_keys = int((contexts - starts).max())
        query_len = self.bounds[members[0] + 1] - self.bounds[members[0]]
        blocks = self._blocks(members, starts, contexts, offset + num_keys)
        adjacent = len(members) == 1 and bool((blocks[0] == blocks[0, 0] + torch.arange(blocks.shape[1])).all())
        causal = query_len > 1 and query_len == num_keys and not (self.window and self.window < num_keys)
        mask = None if causal else self._mask(contexts, starts, query_len, num_keys)
        rows = self._rows(members, query_len)
        return Group(rows, query_len, blocks, adjacent, offset, num_keys, starts, mask, causal)

    def _blocks(self, members: list[int], starts: torch.Tensor, contexts: torch.Tensor, num_slots: int) -> torch.Tensor:
        count = -(-num_slots // self.block_size)
        entries = starts[:, None] // self.block_size + torch.arange(count)
        last = (contexts - 1)[:, None] // self.block_size
        return self.block_tables[members].gather(1, entries.minimum(last))

    def _rows(self, members: list[int], query_len: int) -> torch.Tensor | slice:
        starts = [self.bounds[i] for i in members]
        end = starts[0] + query_len * len(starts)
        return slice(starts[0], end) if starts == list(range(starts[0], end, query_len)) else torch.tensor(starts)

    def _mask(self, contexts: torch.Tensor, starts: torch.Tensor, query_len: int, num_keys: int) -> torch.Tensor | None:
        key_pos = (starts[:, None] + torch.arange(num_keys))[:, None, None]
        query_pos = (contexts[:, None] - query_len + torch.arange(query_len))[:, None, :, None]
        hidden = key_pos > query_pos
        if self.window:
            hidden |= key_pos <= query_pos - self.window
        return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")) if bool(hidden.any()) else None


def cpu_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    plan: CpuPlan,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    biases: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """query `[T, heads, head_dim]` -> the same; biases: per group `[num_seqs, heads, num_keys]` to add to scores."""
    if not plan.groups:
        return torch.empty_like(query)
    plain = softcap is None and sinks is None and biases is None
    out = None
    for i, group in enumerate(plan.groups):
        q = query[group.rows].view(group.blocks.shape[0], group.query_len, *query.shape[1:])
        if plain:
            y = _attend_fused(q, kv_cache, group, scaling)
        else:
            y = _attend_spelled(q, kv_cache, group, scaling, softcap, sinks, None if biases is None else biases[i])
        if y.shape[0] == plan.num_tokens and isinstance(group.rows, slice):
            return y
        out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
        out[group.rows] = y
    assert out is not None
    return out


def _attend_fused(q: torch.Tensor, kv_cache: torch.Tensor, group: Group, scaling: float) -> torch.Tensor:
    """q `[num_seqs, query_len, heads, head_dim]` -> `[num_seqs * query_len, heads, head_dim]`."""
    num_seqs, query_len, heads, head_dim = q.shape
    k, v = group.gather(kv_cache)
    kv_heads = k.shape[1]
    mask = group.mask_in(q.dtype)
    if query_len == 1:
        # the heads that share a KV head stand in for query positions
        q = q.view(num_seqs, kv_heads, heads // kv_heads, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        return y.reshape(num_seqs, heads, head_dim)
    # KV heads stand in for the batch, so that K and V are broadcast, not copied, over the heads that share them
    q = q.view(query_len, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    k, v = (x[0][:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=group.causal, scale=scaling)
    return y.permute(2, 0, 1, 3).reshape(query_len, heads, head_dim)


def _attend_spelled(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    group: Group,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """As _attend_fused, in float32, with what the fused operation can't do."""
    num_seqs, query_len, heads, head_dim = q.shape
    k, v = (x.float() for x in group.gather(kv_cache))
    kv_heads, num_keys = k.shape[1:3]
    q32 = q.float().view(num_seqs, query_len, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = (q32 * scaling @ k.transpose(2, 3)).view(num_seqs, heads, query_len, num_keys)
    if bias is not None:
        scores += bias[:, :, None]
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = _hide(scores, group)
    if sinks is not None:
        extra = sinks.float()[None, :, None, None].expand(num_seqs, -1, query_len, 1)
        weights = torch.cat((scores, extra), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    y = weights.reshape(num_seqs, kv_heads, -1, num_keys) @ v
    y = y.view(num_seqs, kv_heads, -1, query_len, head_dim).permute(0, 3, 1, 2, 4)
    return y.reshape(num_seqs * query_len, heads, head_dim).to(q.dtype)


def _hide(scores: torch.Tensor, group: Group) -> torch.Tensor:
    if group.causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill_(hidden, float("-inf"))
    mask = group.mask_in(torch.float32)
    return scores if mask is None else scores.add_(mask)
