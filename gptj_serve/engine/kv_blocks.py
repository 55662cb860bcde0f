"""`KVBlocks`: who holds which KV blocks, and what is in them.

One allocator for all stages: a block id means the same on each of them. A block has any number of owners. Those that
hold a whole block of known tokens are *published* under a key that stands for these tokens and all before them, so
that others with the same prefix take them instead of computing. Published blocks without an owner stay until their
space is needed; the one that was given back longest ago goes first.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

BlockKey = bytes


class KVBlocks:
    """A pool of blocks of `block_size` tokens. It knows ids only; the tensors are the stages'."""

    def __init__(self, num_blocks: int, block_size: int, *, reuse_prefixes: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reuse_prefixes = reuse_prefixes
        self._num_owners = [0] * num_blocks
        self._free = list(range(num_blocks))  # hold nothing that anyone could want
        self._idle: dict[int, None] = {}  # published and without an owner, given back longest ago first
        self._block_of: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, those included that are still published."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_missing(self, table: Sequence[int], start: int, end: int) -> int:
        """How many free blocks it takes before positions [start, end) can be written through `table`."""
        return self.blocks_for(end) - len(table) + self._is_shared_at(table, start)

    def num_missing_together(self, writes: Iterable[tuple[Sequence[int], int, int]]) -> int:
        """The same for several (table, start, end): of a block's owners the last one to write needs no copy."""
        num_missing = 0
        num_sharers: Counter[int] = Counter()
        for table, start, end in writes:
            num_missing += self.blocks_for(end) - len(table)
            if self._is_shared_at(table, start):
                num_sharers[table[start // self.block_size]] += 1
        return num_missing + sum(min(n, self._num_owners[block] - 1) for block, n in num_sharers.items())

    def prepare(self, table: list[int], start: int, end: int) -> list[tuple[int, int]]:
        """Make positions [start, end) writable through `table`; as many blocks as `num_missing` says must be free.

        Returns the copies (from, to) that the stages must make first: a block with other owners is not written to.
        """
        copies = []
        if self._is_shared_at(table, start):
            index = start // self.block_size
            shared, own = table[index], self._take()
            self._num_owners[shared] -= 1  # it keeps at least one owner
            table[index] = own
            copies.append((shared, own))
        for _ in range(self.blocks_for(end) - len(table)):
            table.append(self._take())
        return copies

    def take_prefix(self, table: list[int], keys: Iterable[BlockKey]) -> int:
        """Append published blocks with these keys to `table` until one is missing; returns how many."""
        num_taken = 0
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._idle.pop(block, None)
            self._num_owners[block] += 1
            table.append(block)
            num_taken += 1
        return num_taken

    def num_shareable(self, keys: Iterable[BlockKey]) -> int:
        """How many of the first blocks with these keys have an owner, so that taking them too needs no free block."""
        num_owned = 0
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            num_owned += self._num_owners[block] > 0
        return num_owned

    def publish(self, block: int, key: BlockKey) -> None:
        """Say that `block` holds, or will before any later microbatch, the tokens that `key` stands for."""
        if self.reuse_prefixes and key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def fork(self, table: Sequence[int]) -> list[int]:
        """A table of the same blocks, which get one owner more."""
        for block in table:
            self._num_owners[block] += 1
        return list(table)

    def release(self, table: list[int]) -> None:
        """Give up all blocks of `table` and empty it. The prefix's beginning will outlast its end."""
        for block in reversed(table):
            self._num_owners[block] -= 1
            if self._num_owners[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        table.clear()

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Let nobody else take these blocks any more: what is in them is not to be trusted."""
        for block in blocks:
            if (key := self._key_of.pop(block, None)) is not None:
                del self._block_of[key]
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)

    def withdraw_all(self) -> None:
        self.withdraw(list(self._key_of))

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that every block is free, idle, or owned as often as it stands in `tables`."""
        owners = Counter(block for table in tables for block in table)
        assert owners == Counter({b: n for b, n in enumerate(self._num_owners) if n}), "owners are miscounted"
        places = [*self._free, *self._idle, *owners]
        assert sorted(places) == list(range(self.num_blocks)), "a KV block was lost or is in two places"
        assert all(block in self._key_of for block in self._idle)
        assert {block: key for key, block in self._block_of.items()} == self._key_of

    def _is_shared_at(self, table: Sequence[int], position: int) -> bool:
        index = position // self.block_size
        return index < len(table) and self._num_owners[table[index]] > 1

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            del self._block_of[self._key_of.pop(block)]
        self._num_owners[block] = 1
        return block


class BlockKeys:
    """The keys of a growing list of tokens' whole blocks.

    A key is a 128-bit BLAKE2b hash over the key before it and the block's tokens; the first follows the salt.
    Requests with different salts share nothing, so that nobody can learn from timing what another tenant asked.
    """

    def __init__(self, block_size: int, salt: str) -> None:
        self._block_size = block_size
        self._keys = [hashlib.blake2b(salt.encode(), digest_size=16).digest()]

    def of(self, token_ids: Sequence[int], num_blocks: int) -> list[BlockKey]:
        """Keys of the first `num_blocks` blocks of `token_ids`, which must go on from those given before."""
        bounds = range((len(self._keys) - 1) * self._block_size, num_blocks * self._block_size + 1, self._block_size)
        for start, end in pairwise(bounds):
            block = array("I", token_ids[start:end]).tobytes()
            self._keys.append(hashlib.blake2b(self._keys[-1] + block, digest_size=16).digest())
        return self._keys[1 : num_blocks + 1]

    def fork(self) -> "BlockKeys":
        copy = BlockKeys.__new__(BlockKeys)
        copy._block_size, copy._keys = self._block_size, self._keys.copy()
        return copy
