"""Attention in tiles of a fixed shape: a query's result has the same bits however its context is cut and batched.

Contexts are cut into tiles of `TILE` tokens from position 0 on, the last one padded. The products of a block of queries
with a tile have shapes of which it was tried that they agree (`bit_equality`); tiles and heads only make the batch of
such products longer. Of a query's tiles the largest score is found first, which no order changes; then what each tile
adds to the numerator and to the denominator of the softmax is summed tile after tile. What is masked adds exact zeros,
so neither queries' padding nor tiles beyond a query's end show.

Shapes: `T` packed tokens, `B` rows that attend together, `Q` queries of each, `N` tiles of each, `H` heads, `Dh`
head_dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptj_serve.model.attention import Attend, KVCache, PagedRow
from gptj_serve.model.bit_equality import agreeing_num_rows

TILE = 64

MAX_PART = 64
"""A head with more dimensions is cut into parts, whose scores are added up: over more dimensions MKL sums in another
order for few queries than for many, and then a decoding row would have to be padded to many."""

MAX_GATHERED = 1 << 19
"""Elements of the keys (or values) of rows that attend together: they stay in the core's cache then."""


@dataclass(frozen=True, slots=True)
class _Queries:
    """Tokens of the rows of a `_Context`, as many of each row. Those that only pad repeat the last one."""

    tokens: Tensor  # [B, Q], places among the packed tokens
    num_tiles: int
    num_visible: int  # of the tiles, those of which no query may miss a token
    hidden: Tensor  # [B, num_tiles - num_visible, 1, Q, TILE], True where a query may not look


@dataclass(frozen=True, slots=True)
class _Context:
    """Rows whose keys and values are gathered together; with several `queries` there is one row."""

    places: Tensor  # [B * N * H * TILE], in a layer of the cache as [slots * H, Dh]
    queries: list[_Queries]


class TiledAttention:
    """An `AttentionPlan` for heads of `head_dim` dimensions, on CPU."""

    def __init__(self, head_dim: int) -> None:
        self._num_queries = agreeing_num_queries(head_dim)

    def __call__(self, rows: Sequence[PagedRow], cache: KVCache) -> Attend:
        contexts = self._plan(rows, cache)

        def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            out = torch.empty_like(q)
            for context in contexts:
                k, v = (_gathered(part, context.places) for part in (keys, values))
                for queries in context.queries:
                    attended = _attend(q[queries.tokens], k, v, queries)
                    out[queries.tokens.flatten()] = attended.flatten(0, 1).to(q.dtype)
            return out

        return attend

    def _plan(self, rows: Sequence[PagedRow], cache: KVCache) -> list[_Context]:
        contexts, short = [], []  # short: (place of the first token, row)
        offset = 0
        for row in rows:
            if row.num_tokens <= self._num_queries[0]:
                short.append((offset, row))
            else:
                blocks = [self._queries([(offset, row)], *block) for block in self._blocks(row.num_tokens)]
                contexts.append(_Context(_places([row], blocks[-1].num_tiles, cache), blocks))
            offset += row.num_tokens
        for group in _groups(short, cache):
            queries = self._queries(group, 0, self._num_queries[0])
            contexts.append(_Context(_places([row for _, row in group], queries.num_tiles, cache), [queries]))
        return contexts

    def _blocks(self, num_tokens: int) -> list[tuple[int, int]]:
        """(first token, number of queries) of the blocks that a row's tokens are cut into; the last may be padded."""
        largest = self._num_queries[-1]
        blocks = [(first, largest) for first in range(0, num_tokens, largest)]
        first = blocks[-1][0]
        return [*blocks[:-1], (first, next(n for n in self._num_queries if n >= num_tokens - first))]

    def _queries(self, rows: Sequence[tuple[int, PagedRow]], first: int, num_queries: int) -> _Queries:
        """Of each row (place of its first token, row) the tokens from its `first` on."""
        tokens = torch.arange(first, first + num_queries)
        last = torch.tensor([row.num_tokens - 1 for _, row in rows])
        tokens = torch.minimum(tokens, last[:, None])  # [B, Q]
        positions = tokens + torch.tensor([row.start for _, row in rows])[:, None]
        num_tiles = int(positions.max()) // TILE + 1
        num_visible = int(positions.min() + 1) // TILE
        others = torch.arange(num_visible * TILE, num_tiles * TILE).view(1, -1, 1, 1, TILE)
        hidden = others > positions[:, None, None, :, None]
        places = tokens + torch.tensor([offset for offset, _ in rows])[:, None]
        return _Queries(places, num_tiles, num_visible, hidden)


def agreeing_num_queries(head_dim: int) -> tuple[int, ...]:
    """How many queries may share a product with a tile without any of them noticing, in any bit.

    MKL cuts single products into parts for its threads if a batch has fewer products than there are threads, so all
    batches around that are tried.
    """
    tile = torch.randn(1, TILE, head_dim, generator=torch.Generator().manual_seed(1))

    def last_of(product: Callable[[Tensor, Tensor], Tensor], batch: int) -> Callable[[Tensor], Tensor]:
        tiles = tile.repeat(batch, 1, 1)
        return lambda rows: product(rows.repeat(batch, 1, 1), tiles)[-1]

    batches = range(1, 2 * torch.get_num_threads() + 4)
    scores, sums = ([last_of(product, batch) for batch in batches] for product in (_scores, torch.bmm))
    agreeing = agreeing_num_rows(scores, head_dim, torch.float32, f"attention's scores for heads of {head_dim}")
    agreeing_sums = agreeing_num_rows(sums, TILE, torch.float32, f"attention's sums over {TILE} tokens")
    return tuple(n for n in agreeing if n in agreeing_sums)


def _groups(short: Sequence[tuple[int, PagedRow]], cache: KVCache) -> list[list[tuple[int, PagedRow]]]:
    """Rows of few tokens, in groups of similar context that are not too large to be gathered at once."""
    width = cache.keys.shape[-2] * cache.keys.shape[-1]
    groups: list[list[tuple[int, PagedRow]]] = []
    for entry in sorted(short, key=lambda entry: -entry[1].end):
        most = groups[-1][0][1].end if groups else 0
        num_padded = -(-most // TILE) * TILE
        if groups and (len(groups[-1]) + 1) * num_padded * width <= MAX_GATHERED:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


def _places(rows: Sequence[PagedRow], num_tiles: int, cache: KVCache) -> Tensor:
    """Where the rows' first `num_tiles` tiles lie, head after head; beyond a row's end, in the padding block."""
    positions = torch.arange(num_tiles * TILE)
    blocks = positions // cache.block_size
    width = int(blocks[-1]) + 1
    tables = [[*row.block_table[:width], *[cache.padding_block] * (width - len(row.block_table))] for row in rows]
    slots = torch.tensor(tables)[:, blocks] * cache.block_size + positions % cache.block_size
    ends = torch.tensor([row.end for row in rows])[:, None]
    slots = torch.where(positions < ends, slots, cache.padding_block * cache.block_size)
    num_heads = cache.keys.shape[-2]
    return (slots.view(-1, 1, TILE) * num_heads + torch.arange(num_heads)[:, None]).flatten()


def _gathered(cached: Tensor, places: Tensor) -> Tensor:
    """A layer's keys or values [blocks, block_size, H, Dh] → [B * N * H, TILE, Dh] in fp32."""
    head_dim = cached.shape[-1]
    return cached.view(-1, head_dim).index_select(0, places).view(-1, TILE, head_dim).float()


def _attend(q: Tensor, k: Tensor, v: Tensor, queries: _Queries) -> Tensor:
    """q [B, Q, H, Dh] over gathered tiles → [B, Q, H, Dh], all in fp32."""
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_tiles = queries.num_tiles
    num_products = num_rows * num_tiles * num_heads
    q = (q.float() * head_dim**-0.5).transpose(1, 2)[:, None].expand(-1, num_tiles, -1, -1, -1)
    scores = _scores(q.reshape(num_products, num_queries, head_dim), k[:num_products])
    scores = scores.view(num_rows, num_tiles, num_heads, num_queries, TILE)
    scores[:, queries.num_visible :].masked_fill_(queries.hidden, -torch.inf)
    weights = scores.sub_(scores.amax(dim=(1, 4), keepdim=True)).exp_()
    totals = weights.sum(dim=-1, keepdim=True)  # [B, N, H, Q, 1]
    sums = torch.bmm(weights.view(num_products, num_queries, TILE), v[:num_products])
    sums = sums.view(num_rows, num_tiles, num_heads, num_queries, head_dim)
    total, out = totals[:, 0], sums[:, 0]
    for tile in range(1, num_tiles):
        total = total + totals[:, tile]
        out = out + sums[:, tile]
    return (out / total).transpose(1, 2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """[..., Q, Dh] with tiles [..., TILE, Dh] → [..., Q, TILE]"""
    parts = zip(torch.split(q, MAX_PART, dim=-1), torch.split(k.transpose(1, 2), MAX_PART, dim=1), strict=True)
    first_q, first_k = next(parts)
    scores = torch.bmm(first_q, first_k)
    for part_q, part_k in parts:
        scores.baddbmm_(part_q, part_k)
    return scores
