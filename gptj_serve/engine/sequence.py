"""`Sequence`: a chain of tokens and the KV blocks that hold what is computed of it."""

from dataclasses import dataclass, field

from gptj_serve.engine.kv_blocks import BlockKeys, KVBlocks


@dataclass(slots=True, eq=False)
class Sequence:
    """`num_computed` counts tokens handed to the stages, not returned: stages run microbatches in order, so a later
    microbatch finds the KV of an earlier one in place. A sequence is schedulable iff it has uncomputed tokens, or its
    next one can be fed (`ahead`): then one more is counted than is known, until that one is here.

    `num_evictions` tells whether the KV that a microbatch in flight works on is still this sequence's.
    """

    token_ids: list[int]
    keys: BlockKeys
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    num_evictions: int = 0
    _num_published: int = 0

    @property
    def num_uncomputed(self) -> int:
        return max(0, len(self.token_ids) - self.num_computed)

    def prefix_keys(self, blocks: KVBlocks, end: int) -> list[bytes]:
        """Keys of the whole blocks of positions [0, end)."""
        return self.keys.of(self.token_ids, end // blocks.block_size) if blocks.reuse_prefixes else []

    def reuse(self, blocks: KVBlocks, end: int) -> int:
        """Take over what others have computed of positions [num_computed, end); returns how many tokens that saves."""
        num_own = len(self.block_table)
        if self.num_computed != num_own * blocks.block_size:
            return 0  # in the middle of a block of its own
        num_taken = blocks.take_prefix(self.block_table, self.prefix_keys(blocks, end)[num_own:])
        self.num_computed += num_taken * blocks.block_size
        self._num_published = len(self.block_table)
        return num_taken * blocks.block_size

    def publish(self, blocks: KVBlocks, end: int) -> None:
        """Let others take the whole blocks of positions [0, end), all handed to the stages by now, as far as it is
        known what they hold."""
        end = min(end, len(self.token_ids))
        if self._num_published < end // blocks.block_size:
            for index, key in enumerate(self.prefix_keys(blocks, end)[self._num_published :], self._num_published):
                blocks.publish(self.block_table[index], key)
            self._num_published = end // blocks.block_size

    def evict(self, blocks: KVBlocks) -> None:
        """Give up all KV."""
        blocks.release(self.block_table)
        self.num_computed = self._num_published = 0
        self.num_evictions += 1

    def fork(self, blocks: KVBlocks) -> "Sequence":
        """Another sequence with the same tokens over the same blocks."""
        return Sequence(
            self.token_ids.copy(),
            self.keys.fork(),
            self.num_computed,
            blocks.fork(self.block_table),
            self.num_evictions,
            self._num_published,
        )
