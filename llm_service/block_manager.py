"""Who owns which block of the paged KV cache, and which blocks hold a known prefix.

Counts and hashes only: knows neither tensors nor IO.  Paged attention: Kwon et al. 2023 (vLLM); prefix
caching by chained block hashes.  Here a block's hash also covers the pictures under its visual positions,
because their token ids are all the same.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from llm_service.sequence import Sequence


class BlockManager:
    """Blocks are free, in use (referenced by block tables), or free but still holding a cached prefix.

    Free blocks are reused in the order in which they were freed, so cached prefixes die oldest first.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Let the block table cover `num_tokens`; False, and nothing changed, if too few blocks are free."""
        missing = self.num_blocks_for(num_tokens) - len(sequence.block_table)
        if missing > len(self._free):
            return False
        if missing > 0:
            sequence.block_table = sequence.block_table + [self._take_free_block() for _ in range(missing)]
        return True

    def free(self, sequence: Sequence) -> None:
        """Give all blocks back.  The last ones first: a prefix is worth more than its continuation."""
        for block in reversed(sequence.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
        sequence.block_table = []
        sequence.num_published_blocks = 0

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Tokens of the longest cached prefix; at least one token is always left to compute."""
        return len(self._cached_blocks(sequence)) * self.block_size

    def attach_cached_prefix(self, sequence: Sequence) -> int:
        """Let the block table start with the cached prefix; returns its tokens."""
        assert not sequence.block_table and sequence.num_computed_tokens == 0
        sequence.block_table = self._cached_blocks(sequence)
        for block in sequence.block_table:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1
        sequence.num_published_blocks = len(sequence.block_table)
        return len(sequence.block_table) * self.block_size

    def publish(self, sequence: Sequence) -> None:
        """Make the blocks findable that are full of computed tokens whose values are known.

        The step that computes them may be under way still: whoever finds them runs in a later one.
        """
        num_full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // self.block_size
        if num_full <= sequence.num_published_blocks or not self.enable_prefix_caching:
            return
        self._extend_hashes(sequence, num_full)
        for index in range(sequence.num_published_blocks, num_full):
            block, block_hash = sequence.block_table[index], sequence.block_hashes[index]
            if block_hash not in self._block_of_hash and block not in self._hash_of_block:
                self._block_of_hash[block_hash] = block
                self._hash_of_block[block] = block_hash
        sequence.num_published_blocks = num_full

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; blocks in use stay in use."""
        self._block_of_hash.clear()
        self._hash_of_block.clear()

    def check(self, sequences: list[Sequence]) -> None:
        """Assert that blocks are referenced exactly as often as the tables of `sequences` say."""
        counts = [0] * self.num_blocks
        for sequence in sequences:
            for block in sequence.block_table:
                counts[block] += 1
        assert counts == self._ref_counts, "reference counts differ from block tables"
        free = {block for block, count in enumerate(counts) if count == 0}
        assert free == set(self._free), "free list differs from reference counts"
        assert {block: key for key, block in self._block_of_hash.items()} == self._hash_of_block

    def _take_free_block(self) -> int:
        block, _ = self._free.popitem(last=False)
        stale = self._hash_of_block.pop(block, None)
        if stale is not None:
            del self._block_of_hash[stale]
        self._ref_counts[block] = 1
        return block

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        if not self.enable_prefix_caching:
            return []
        num_full = min(sequence.num_tokens - 1, len(sequence.token_ids)) // self.block_size
        self._extend_hashes(sequence, num_full)
        blocks = []
        for block_hash in sequence.block_hashes[:num_full]:
            block = self._block_of_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        for index in range(len(sequence.block_hashes), num_blocks):
            parent = sequence.block_hashes[-1] if index else _root_hash(sequence.group.cache_salt)
            start, end = index * self.block_size, (index + 1) * self.block_size
            digest = hashlib.sha256(parent)
            digest.update(array("q", sequence.token_ids[start:end]).tobytes())
            for tile in sequence.tiles_between(start, end):
                # Fixed width, so that no other split of the same bytes means another picture.
                digest.update((tile.offset - start).to_bytes(8, "little", signed=True))
                digest.update(hashlib.sha256(tile.key).digest())
            sequence.block_hashes.append(digest.digest())


def _root_hash(cache_salt: bytes) -> bytes:
    return hashlib.sha256(b"tessera.prefix" + cache_salt).digest()
