"""Attention over paged keys and values, read where they lie.

Two kernels over the same rows: one takes those of a single token (decode), whose cost is reading the context, and
splits long contexts over many programs; the other takes the longer ones (prompt chunks) in tiles of queries, whose cost
is the products: they want other tiles and other registers. Each passes over the other's rows. Scores, softmax and sums
are fp32; products' operands have the KV's dtype.

A slot past a row's context may hold NaN of its last owner, and NaN times a weight of 0 is NaN: such slots are loaded
as zeros. Shapes: `T` packed tokens, `R` rows, `H` heads, `Dh` head_dim, `S` splits, `M` queries and `N` keys of a tile.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_serve.kernels.gpu.rows import DeviceRows
from gptj_serve.kernels.gpu.tiles import Tiles

MAX_SPLITS = 32
"""A power of two: all are joined by one kernel, whatever their number."""

BALANCED_SPAN = 512
"""Tokens that one program reads alone at most, as long as MAX_SPLITS allows: else the longest row keeps all waiting."""


UNSPECIALIZED = ["num_rows", "max_blocks", "num_splits"]
UNALIGNED = ["row_starts", "context_lengths", "block_tables"]
"""Arguments whose values, or places in memory, change from step to step: none gets kernels of its own."""


@triton.jit
def _attend_span(
    q, query_positions, keys, values, table, head, first, end, scale,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Queries [M, PADDED_DIM] over the context's tokens [first, end): (largest score [M], sum of weights [M],
    weighted values [M, PADDED_DIM]). Scores are logarithms to the base 2."""
    dims = tl.arange(0, PADDED_DIM)
    columns = tl.arange(0, N)
    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    weighted = tl.zeros([M, PADDED_DIM], tl.float32)
    for start in tl.range(first, end, N, num_stages=NUM_STAGES):
        at = start + columns
        is_held = at < end
        block = tl.load(table + at // BLOCK_SIZE, mask=is_held, other=0).to(tl.int64)
        slot = (block * NUM_HEADS + head) * BLOCK_SIZE + at % BLOCK_SIZE
        places = slot[:, None] * DIM + dims[None, :]
        mask = is_held[:, None]
        if PADDED_DIM != DIM:
            mask = mask & (dims < DIM)[None, :]
        k = tl.load(keys + places, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = is_held[None, :] & (at[None, :] <= query_positions[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        # Infinite scores are an overflow of the model's: they become NaN here, and are seen.
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + places, mask=mask, other=0.0)
        weighted = tl.dot(weights.to(v.dtype), v, weighted * shrink[:, None], input_precision="ieee")
        largest = new_largest
    return largest, total, weighted


@triton.jit
def _span_of(context, num_splits, N: tl.constexpr):
    """How many tokens of a context each split reads, the last ones less or none."""
    return tl.cdiv(tl.cdiv(context, num_splits), N) * N


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _attend_tokens(
    q, keys, values, out, partial_out, partial_stats, row_starts, context_lengths, block_tables, max_blocks, scale,
    Q_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, NUM_HEADS: tl.constexpr, DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, NUM_STAGES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Rows of one token; grid (H, S, R). Split: (weighted values, largest score, sum of weights) for `_join_splits`.

    The query is the first of M rows of a tile, since tensor cores have none of one row; they have time."""
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(1)
    token = tl.load(row_starts + row)
    if tl.load(row_starts + row + 1) - token != 1:
        return
    context = tl.load(context_lengths + row)
    span = _span_of(context, num_splits, N)
    first = split * span
    end = tl.minimum(first + span, context)
    if first >= end:
        return
    dims = tl.arange(0, PADDED_DIM)
    lanes = tl.arange(0, M)
    mask = (lanes == 0)[:, None] & (dims < DIM)[None, :]
    own = head * DIM + dims[None, :] + lanes[:, None] * 0
    query = tl.load(q + token.to(tl.int64) * Q_STRIDE + own, mask=mask, other=0.0)
    largest, total, weighted = _attend_span(
        query, lanes * 0 + context, keys, values, block_tables + row.to(tl.int64) * max_blocks, head, first, end, scale,
        NUM_HEADS, DIM, PADDED_DIM, BLOCK_SIZE, M, N, NUM_STAGES,
    )  # fmt: skip
    if IS_SPLIT:
        place = (row.to(tl.int64) * NUM_HEADS + head) * num_splits + split
        tl.store(partial_out + place * DIM + dims[None, :] + lanes[:, None] * 0, weighted, mask=mask)
        tl.store(partial_stats + place * 2 + lanes * 0, largest, mask=lanes == 0)
        tl.store(partial_stats + place * 2 + 1 + lanes * 0, total, mask=lanes == 0)
    else:
        attended = weighted / total[:, None]
        tl.store(out + token.to(tl.int64) * OUT_STRIDE + own, attended.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _join_splits(
    out, partial_out, partial_stats, row_starts, context_lengths, num_splits,
    OUT_STRIDE: tl.constexpr, NUM_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, N: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    """What the splits of a row of one token come to; grid (H, R)."""
    head, row = tl.program_id(0), tl.program_id(1)
    token = tl.load(row_starts + row)
    if tl.load(row_starts + row + 1) - token != 1:
        return
    context = tl.load(context_lengths + row)
    splits = tl.arange(0, PADDED_SPLITS)
    dims = tl.arange(0, PADDED_DIM)
    has_work = splits * _span_of(context, num_splits, N) < context  # the others have written nothing
    place = (row.to(tl.int64) * NUM_HEADS + head) * num_splits + splits
    largest = tl.load(partial_stats + place * 2, mask=has_work, other=float("-inf"))
    total = tl.load(partial_stats + place * 2 + 1, mask=has_work, other=0.0)
    mask = has_work[:, None] & (dims < DIM)[None, :]
    weighted = tl.load(partial_out + place[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
    weights = tl.exp2(largest - tl.max(largest, 0))
    attended = tl.sum(weighted * weights[:, None], 0) / tl.sum(total * weights, 0)
    target = out + token.to(tl.int64) * OUT_STRIDE + head * DIM + dims
    tl.store(target, attended.to(out.dtype.element_ty), mask=dims < DIM)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _attend_chunks(
    q, keys, values, out, row_starts, context_lengths, block_tables, num_rows, max_blocks, scale,
    Q_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, NUM_HEADS: tl.constexpr, DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of several tokens, M queries at a time; grid (T // M + R, H).

    A row's tiles are numbered from row_starts[row] // M + row: as many numbers as it may need, wherever it begins
    (as in vLLM's unified attention). Later tiles see more context and take longer: they are begun first.
    """
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    row = 0
    above = num_rows
    while row + 1 < above:  # the last row whose first tile is not after this one
        middle = (row + above) // 2
        if tl.load(row_starts + middle) // M + middle <= tile:
            row = middle
        else:
            above = middle
    first_token = tl.load(row_starts + row)
    num_tokens = tl.load(row_starts + row + 1) - first_token
    first = (tile - first_token // M - row) * M
    if num_tokens <= 1 or first >= num_tokens:
        return
    context = tl.load(context_lengths + row)
    queries = first + tl.arange(0, M)
    positions = context - num_tokens + queries
    end = tl.minimum(context, context - num_tokens + first + M)
    dims = tl.arange(0, PADDED_DIM)
    token = (first_token + queries).to(tl.int64)
    mask = (queries < num_tokens)[:, None]
    if PADDED_DIM != DIM:
        mask = mask & (dims < DIM)[None, :]
    query = tl.load(q + token[:, None] * Q_STRIDE + head * DIM + dims[None, :], mask=mask, other=0.0)
    _largest, total, weighted = _attend_span(
        query, positions, keys, values, block_tables + row * max_blocks, head, 0, end, scale,
        NUM_HEADS, DIM, PADDED_DIM, BLOCK_SIZE, M, N, NUM_STAGES,
    )  # fmt: skip
    attended = (weighted / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + token[:, None] * OUT_STRIDE + head * DIM + dims[None, :], attended, mask=mask)


class Attention:
    """The attention of all layers of one microbatch's shape; its workspace is theirs in turn."""

    def __init__(
        self, rows: DeviceRows, num_heads: int, head_dim: int, block_size: int, tiles: Tiles, num_sms: int
    ) -> None:
        """`num_sms`: multiprocessors that want work."""
        self._rows = rows
        self._tiles = tiles
        self._num_heads = num_heads
        self._num_splits = choose_num_splits(
            rows.num_rows, num_heads, rows.max_blocks * block_size, num_sms, tiles.decode.n
        )
        self._scale = math.log2(math.e) / math.sqrt(head_dim)
        self._shape = {
            "NUM_HEADS": num_heads,
            "DIM": head_dim,
            "PADDED_DIM": max(16, triton.next_power_of_2(head_dim)),
        }
        self._block_size = block_size
        device, partials = rows.slots.device, (rows.num_rows, num_heads, self._num_splits)
        is_split = self._num_splits > 1
        self._partial_out = torch.empty((*partials, head_dim) if is_split else (1,), device=device)
        self._partial_stats = torch.empty((*partials, 2) if is_split else (1,), device=device)

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Rotated queries in the first H * Dh columns of `q` [T, ...], over one layer's keys and values
        [blocks, H, block_size, Dh] → the first H * Dh columns of `out` [T, ...]. Tokens of no row stay as they are."""
        rows, tiles = self._rows, self._tiles
        strides = {"Q_STRIDE": q.stride(0), "OUT_STRIDE": out.stride(0)}
        table = (rows.row_starts, rows.context_lengths, rows.block_tables)
        if rows.max_row_tokens > 1:
            chunk = tiles.chunk
            _attend_chunks[rows.num_tokens // chunk.m + rows.num_rows, self._num_heads](
                q, keys, values, out, *table, rows.num_rows, rows.max_blocks, self._scale,
                **strides, **self._shape, BLOCK_SIZE=self._block_size, M=chunk.m, N=chunk.n,
                NUM_STAGES=chunk.num_stages, num_warps=chunk.num_warps,
            )  # fmt: skip
        decode, is_split = tiles.decode, self._num_splits > 1
        _attend_tokens[self._num_heads, self._num_splits, rows.num_rows](
            q, keys, values, out, self._partial_out, self._partial_stats, *table, rows.max_blocks, self._scale,
            **strides, **self._shape, BLOCK_SIZE=self._block_size, M=decode.m, N=decode.n,
            NUM_STAGES=decode.num_stages, IS_SPLIT=is_split, num_warps=decode.num_warps,
        )  # fmt: skip
        if is_split:
            _join_splits[self._num_heads, rows.num_rows](
                out, self._partial_out, self._partial_stats, rows.row_starts, rows.context_lengths, self._num_splits,
                OUT_STRIDE=out.stride(0), **self._shape, N=decode.n,
                PADDED_SPLITS=MAX_SPLITS, num_warps=4,
            )  # fmt: skip


def choose_num_splits(num_rows: int, num_heads: int, max_context: int, num_sms: int, span: int) -> int:
    """Over how many programs a row of one token spreads its context: so that few rows give each multiprocessor two,
    and that of many rows a long one does not take much longer than the others. At least `span` tokens for each."""
    to_fill = -(-2 * num_sms // (num_rows * num_heads))
    to_balance = -(-max_context // BALANCED_SPAN)
    return max(1, min(max(to_fill, to_balance), -(-max_context // span), MAX_SPLITS))
