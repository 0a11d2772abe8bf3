"""Blocks of the KV cache: reference counts, prefix hashes, least-recently-used eviction. No tensors."""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

from porter.runtime.sequence import Sequence


class BlockManager:
    """Hands out the `num_blocks` blocks of `block_size` tokens each.

    A block is in use (reference count > 0) or free. A free block may still hold a prefix that a later sequence can take
    back; free blocks without one are handed out first, then those that were freed longest ago.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def match_prefix(self, seq: Sequence) -> list[int]:
        """Cached blocks that hold the start of `seq`; at least its last token is always left to compute."""
        if not self.enable_prefix_caching:
            return []
        self._extend_hashes(seq, seq.num_tokens - 1)
        matched = []
        for block_hash in seq.block_hashes[: (seq.num_tokens - 1) // self.block_size]:
            block = self._block_of_hash.get(block_hash)
            if block is None:
                break
            matched.append(block)
        return matched

    def allocate(self, seq: Sequence, num_tokens: int, prefix: Iterable[int] = (), reserve: int = 0) -> bool:
        """Make the block table of `seq` reach `num_tokens`, starting with the blocks of `prefix` if it is empty.

        False, with nothing changed, if that would leave fewer than `reserve` blocks free.
        """
        prefix = list(prefix)
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(prefix)
        revived = sum(self._ref_counts[block] == 0 for block in prefix)
        if max(num_new, 0) + revived + reserve > len(self._free):
            return False
        for block in prefix:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1
        seq.block_table += prefix
        seq.num_committed += len(prefix) * self.block_size
        seq.block_table += [self._take_free_block() for _ in range(num_new)]
        return True

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """Let others share the full blocks of the first `num_tokens` tokens, which are known and computed by now."""
        if not self.enable_prefix_caching:
            return
        first, last = seq.num_committed // self.block_size, num_tokens // self.block_size
        if first >= last:
            return
        seq.num_committed = last * self.block_size
        self._extend_hashes(seq, num_tokens)
        for block, block_hash in zip(seq.block_table[first:last], seq.block_hashes[first:last], strict=True):
            if self._hashes[block] is None and block_hash not in self._block_of_hash:
                self._hashes[block] = block_hash
                self._block_of_hash[block_hash] = block

    def free(self, seq: Sequence) -> None:
        """Give back the blocks of `seq`; its last blocks are the first to be evicted."""
        for block in reversed(seq.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)
        seq.block_table.clear()
        seq.num_committed = 0

    def reset_prefix_cache(self) -> None:
        """Forget all prefixes; blocks in use stay in use."""
        self._block_of_hash.clear()
        self._hashes = [None] * self.num_blocks

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless counts, free list and prefixes agree with the block tables of all `sequences`."""
        used = Counter(block for seq in sequences for block in seq.block_table)
        assert [used[block] for block in range(self.num_blocks)] == self._ref_counts, "reference counts"
        assert {block for block, count in enumerate(self._ref_counts) if count == 0} == set(self._free), "free list"
        hashed = {block_hash: block for block, block_hash in enumerate(self._hashes) if block_hash is not None}
        assert hashed == self._block_of_hash, "prefixes"

    def _take_free_block(self) -> int:
        block, _ = self._free.popitem(last=False)
        stale = self._hashes[block]
        if stale is not None:
            del self._block_of_hash[stale]
            self._hashes[block] = None
        self._ref_counts[block] = 1
        return block

    def _extend_hashes(self, seq: Sequence, num_tokens: int) -> None:
        for start in range(len(seq.block_hashes) * self.block_size, num_tokens - self.block_size + 1, self.block_size):
            digest = hashlib.blake2b(seq.block_hashes[-1] if seq.block_hashes else b"", digest_size=16)
            digest.update(array("q", seq.tokens(start, start + self.block_size)).tobytes())
            seq.block_hashes.append(digest.digest())
