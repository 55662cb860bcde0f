"""The shapes that microbatches are padded to, so that a graph, captured for each before, fits every decode step."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

ROW_STEPS = ((8, 64), (16, 128), (32, 256), (64, 512))
"""From 8 rows on: sizes rise by so many up to so many rows, then by 128. Rows of a decode step cost little beside the
weights, which are read for all of them, so an eighth to a fifth of padding may be."""

TOKEN_STEP = 16
"""Steps without a graph have a multiple of so many tokens. Triton compiles a kernel anew for a number that is the first
not to be one, in the middle of the traffic; matrix products like it as well."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A decode step's shape: rows of one token, whose block tables have at most `max_blocks` entries."""

    num_rows: int
    max_blocks: int


class DecodeBuckets:
    """All buckets up to `max_rows` rows of `max_blocks` blocks."""

    def __init__(self, max_rows: int, max_blocks: int) -> None:
        self.max_rows = max_rows
        self.max_blocks = max_blocks
        self.row_sizes = row_sizes(max_rows)
        self._block_sizes = block_sizes(max_blocks)

    def largest_first(self) -> list[Bucket]:
        return [Bucket(rows, blocks) for rows in reversed(self.row_sizes) for blocks in reversed(self._block_sizes)]

    def smallest_for(self, num_rows: int, num_blocks: int) -> Bucket:
        """The smallest that holds them. Raises `IndexError` if none does."""
        return Bucket(self.rows_for(num_rows), _at_least(self._block_sizes, num_blocks, "KV blocks in a row"))

    def rows_for(self, num_rows: int) -> int:
        return _at_least(self.row_sizes, num_rows, "rows in a step (max_num_sequences)")


def row_sizes(max_rows: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, …: ascending, and ending with `max_rows`."""
    sizes = [1, 2, 4]
    for step, end in ROW_STEPS:
        sizes += range(sizes[-1] // step * step + step, end + 1, step)
    sizes += range(sizes[-1] + 128, max_rows, 128)
    return [*(size for size in sizes if size < max_rows), max_rows]


def block_sizes(max_blocks: int) -> list[int]:
    """A quarter of the context, which most sequences stay within, and all of it: ascending."""
    return sorted({-(-max_blocks // 4), max_blocks})


def padded_to_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length() if number else 0


def padded_tokens(num_tokens: int) -> int:
    return -(-num_tokens // TOKEN_STEP) * TOKEN_STEP


def _at_least(sizes: Sequence[int], number: int, what: str) -> int:
    if number > sizes[-1]:
        raise IndexError(f"{number} {what}, where there is room for {sizes[-1]}")
    return sizes[bisect_left(sizes, number)]
