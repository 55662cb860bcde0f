"""`StepBuffers`: a microbatch's numbers on their way to the device: one array in pinned memory, one copy, fixed places.

Shapes: `T` packed tokens, `R` rows, `B` blocks of a table, `S` sample places; all padded (`StepShape`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptj_serve.kernels.gpu.rows import DeviceRows
from gptj_serve.pipeline.gpu.buckets import Bucket, padded_to_power_of_two, padded_tokens
from gptj_serve.pipeline.gpu.device import Device, Stream
from gptj_serve.pipeline.gpu.staging import Staging
from gptj_serve.steps import Row

Words = NDArray[np.int32]

ALIGNMENT = 32
"""Words. Each array begins at a multiple of 128 bytes: Triton compiles kernels for how pointers are aligned."""


@dataclass(frozen=True)
class StepShape:
    """What a graph, or a kernel as it was compiled, depends on."""

    num_tokens: int  # T
    num_rows: int  # R
    max_blocks: int  # B
    num_places: int  # S
    max_row_tokens: int  # 1 in a decode step

    @cached_property
    def parts(self) -> list[slice]:
        """Where the arrays of `StepInputs` and `_HostArrays` lie, in words."""
        tokens, rows = self.num_tokens, self.num_rows
        sizes = [tokens, tokens, tokens, tokens, rows + 1, rows, self.num_places, rows * self.max_blocks]
        starts = accumulate((_aligned(size) for size in sizes), initial=0)
        return [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]

    @property
    def num_words(self) -> int:
        return _aligned(self.parts[-1].stop)


def _aligned(num_words: int) -> int:
    return -(-num_words // ALIGNMENT) * ALIGNMENT


MIN_PADDED = 16
"""Rows of a step without a graph, and the longest row's tokens, are padded to powers of two from here on."""


def decode_shape(bucket: Bucket) -> StepShape:
    return StepShape(bucket.num_rows, bucket.num_rows, bucket.max_blocks, bucket.num_rows, 1)


def mixed_shape(num_tokens: int, num_rows: int, max_row_tokens: int, max_blocks: int, num_places: int) -> StepShape:
    """Of a step that is launched kernel by kernel: prompts come in too many lengths for graphs, and take longer to
    compute than to launch. It is padded a little all the same: so a few compiled kernels and sizes of memory serve all.
    """
    return StepShape(
        padded_tokens(num_tokens),
        max(MIN_PADDED, padded_to_power_of_two(num_rows)),
        max_blocks,
        num_places,
        max(MIN_PADDED, padded_to_power_of_two(max_row_tokens)),
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a microbatch must keep to. The memory of graphs and buffers is made for it."""

    dtype: torch.dtype  # of hidden states and logits
    num_token_ids: int  # of the embedding
    num_sampled_ids: int  # the tokenizer's; logits beyond have no token
    num_positions: int
    num_kv_blocks: int  # the padding block comes after them
    block_size: int
    max_rows: int
    max_tokens: int

    @property
    def max_blocks(self) -> int:
        """Of one sequence."""
        return -(-self.num_positions // self.block_size)


class StepInputs(NamedTuple):
    """On the device."""

    rows: DeviceRows
    fed_from: Tensor  # [T]: which of the last step's chosen tokens this one is; -1: it is the one in `rows`
    places: Tensor  # [S]: the packed tokens whose logits are wanted


class _HostArrays:
    """As `StepInputs`, to be filled."""

    def __init__(self, words: Words, shape: StepShape) -> None:
        parts = [words[part] for part in shape.parts]
        self.token_ids, self.positions, self.slots, self.fed_from = parts[:4]
        self.row_starts, self.context_lengths, self.places, tables = parts[4:]
        self.block_tables = tables.reshape(shape.num_rows, shape.max_blocks)


class StepBuffers:
    """Each step's array goes by a `Staging`, and lies in the same place on the device."""

    def __init__(self, device: Device, stream: Stream, limits: Limits) -> None:
        self._limits = limits
        largest = mixed_shape(limits.max_tokens, limits.max_rows, limits.max_tokens, limits.max_blocks, limits.max_rows)
        self._staging = Staging(device, stream, largest.num_words, torch.int32)
        self._decode_arrays: dict[tuple[int, StepShape], _HostArrays] = {}  # of other steps there are too many shapes

    def inputs(self, shape: StepShape) -> StepInputs:
        """Where steps of this shape find what `put` brings."""
        token_ids, positions, slots, fed_from, row_starts, context_lengths, places, tables = (
            self._staging.on_device[part] for part in shape.parts
        )
        tables = tables.view(shape.num_rows, shape.max_blocks)
        rows = DeviceRows(token_ids, positions, slots, row_starts, context_lengths, tables, shape.max_row_tokens)
        return StepInputs(rows, fed_from, places)

    def put(
        self, shape: StepShape, rows: Sequence[Row], places: Sequence[int] = (), fed_from: Sequence[int] = ()
    ) -> None:
        """Copy a microbatch to where steps of this shape find it. `fed_from`, if any, has one entry for each token.

        Raises `IndexError` for what lies outside of the model's tokens, positions or KV blocks: on a GPU it would end
        the process, or be another sequence's.
        """
        half = self._staging.begin()
        arrays = self._decode_arrays.get((half, shape)) or _HostArrays(self._staging.arrays[half], shape)
        if shape.max_row_tokens == 1:
            self._decode_arrays[half, shape] = arrays
        _fill(arrays, self._limits, rows, shape.max_row_tokens == 1)
        arrays.places[: len(places)] = places
        arrays.places[len(places) :] = 0
        arrays.fed_from[: len(fed_from)] = fed_from
        arrays.fed_from[len(fed_from) :] = -1
        self._staging.send(shape.num_words)


def _fill(arrays: _HostArrays, limits: Limits, rows: Sequence[Row], is_decode: bool) -> None:
    """All but places and what tokens are fed from. Python touches each token and each block of a table once."""
    num_rows = len(rows)
    starts = np.fromiter((row.start for row in rows), np.int32, num_rows)
    num_blocks = np.fromiter((len(row.block_table) for row in rows), np.int32, num_rows)
    blocks = np.fromiter(chain.from_iterable(row.block_table for row in rows), np.int32)
    row_of_token = np.arange(num_rows)
    if is_decode:
        num_tokens, positions, ends = num_rows, starts, starts + 1
        token_ids = np.fromiter((row.token_ids[0] for row in rows), np.int32, num_rows)
        arrays.row_starts[:num_rows] = row_of_token
    else:
        lengths = np.fromiter((len(row.token_ids) for row in rows), np.int32, num_rows)
        ends, packed_ends = starts + lengths, lengths.cumsum(dtype=np.int32)
        num_tokens = int(packed_ends[-1])
        row_of_token = row_of_token.repeat(lengths)
        positions = np.arange(num_tokens, dtype=np.int32) + (ends - packed_ends)[row_of_token]
        token_ids = np.fromiter(chain.from_iterable(row.token_ids for row in rows), np.int32, num_tokens)
        arrays.row_starts[0] = 0
        arrays.row_starts[1:num_rows] = packed_ends[:-1]
    arrays.row_starts[num_rows:] = num_tokens
    _check(limits, token_ids, starts, ends, num_blocks, blocks)
    block, offset = positions // limits.block_size, positions % limits.block_size
    first_blocks = num_blocks.cumsum() - num_blocks
    arrays.token_ids[:num_tokens] = token_ids
    arrays.token_ids[num_tokens:] = 0
    arrays.positions[:num_tokens] = positions
    arrays.positions[num_tokens:] = 0
    arrays.slots[:num_tokens] = blocks[first_blocks[row_of_token] + block] * limits.block_size + offset
    arrays.slots[num_tokens:] = limits.num_kv_blocks * limits.block_size
    arrays.context_lengths[:num_rows] = ends
    arrays.context_lengths[num_rows:] = 0
    arrays.block_tables.fill(limits.num_kv_blocks)
    arrays.block_tables[:num_rows][np.arange(arrays.block_tables.shape[1]) < num_blocks[:, None]] = blocks


def _check(limits: Limits, token_ids: Words, starts: Words, ends: Words, num_blocks: Words, blocks: Words) -> None:
    # As unsigned numbers negative ones are larger than all others.
    if (token_ids.view(np.uint32) >= limits.num_token_ids).any():
        raise IndexError(f"index out of range: the {limits.num_token_ids} token ids lack one in {token_ids.tolist()}")
    if (starts.view(np.uint32) >= limits.num_positions).any() or (ends > limits.num_positions).any():
        raise IndexError(f"positions from {starts.min()} to {ends.max()} in a context of {limits.num_positions}")
    if (ends > num_blocks * limits.block_size).any() or (blocks.view(np.uint32) >= limits.num_kv_blocks).any():
        raise IndexError(f"rows are not in the {limits.num_kv_blocks} KV blocks")
