"""`KVBlocks`: which KV blocks are free. One allocator for all stages: a block id means the same on each of them."""


class KVBlocks:
    """A pool of blocks of `block_size` tokens. It knows ids only; the tensors are the stages'."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def extend(self, block_table: list[int], num_tokens: int) -> bool:
        """Grow `block_table` until it covers `num_tokens`; False, and nothing changed, if too few blocks are free."""
        num_missing = self.blocks_for(num_tokens) - len(block_table)
        if num_missing > len(self._free):
            return False
        for _ in range(num_missing):
            block_table.append(self._free.pop())
        return True

    def release(self, block_table: list[int]) -> None:
        """Return all blocks of `block_table` and empty it."""
        self._free.extend(block_table)
        block_table.clear()

    def check_integrity(self, block_tables: list[list[int]]) -> None:
        """Assert that every block is either free or in exactly one of `block_tables`."""
        seen = [*self._free, *(block for table in block_tables for block in table)]
        assert sorted(seen) == list(range(self.num_blocks)), "a KV block was lost or is held twice"
