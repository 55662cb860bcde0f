"""Attention over paged keys and values.

A sequence's KV lies in blocks of `block_size` tokens, named by its block table. A microbatch packs rows of any
length: those with one token (decode) attend together, in groups of similar context; longer ones (prompt chunks)
attend one by one. Shapes: `T` packed tokens, `S` decode rows, `C` context length, `H` heads, `Dh` head_dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptj_serve.model.block import AttentionFn
from gptj_serve.model.config import GPTJConfig


@dataclass(frozen=True, slots=True)
class PagedRow:
    """Where one row's tokens stand: `num_tokens` from position `start`, in the blocks of `block_table`."""

    start: int
    num_tokens: int
    block_table: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class KVCache:
    """The KV tensors of one stage: per layer keys and values, each [num_blocks + 1, block_size, H, Dh].

    The last block belongs to nobody and stays zero: it pads block tables.
    """

    def __init__(
        self,
        config: GPTJConfig,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.padding_block = num_blocks
        shape = (num_layers, num_blocks + 1, block_size, config.n_head, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        copy_blocks([*self.keys, *self.values], copies)


def copy_blocks(layers: Sequence[Tensor], copies: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks (from, to) in tensors [num_blocks, ...], as if one after the other."""
    both = torch.tensor(simultaneous(copies))
    if layers[0].is_cuda:
        both = both.pin_memory()  # or else the host would wait until the device has done all it was given
    sources, targets = both.to(layers[0].device, non_blocking=True)
    copy_blocks_at_once(layers, sources, targets)


def simultaneous(copies: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Sources and targets of copies that, made all at once, do what these do one after the other."""
    origins: dict[int, int] = {}  # what a block is to hold: what this one holds now
    for source, target in copies:
        origins[target] = origins.get(source, source)
    return list(origins.values()), list(origins)


def copy_blocks_at_once(layers: Sequence[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Both int64, on the layers' device."""
    for layer in layers:  # one by one: what is on its way is small then
        layer[targets] = layer[sources]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A row of several tokens."""

    tokens: slice  # of the packed tokens
    blocks: Tensor  # [num_blocks of the context]
    end: int  # C
    mask: Tensor | None  # [1, 1, num_tokens, C], True where a query may look; None: plain causal from position 0


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Rows of one token that attend together, padded to the longest context among them."""

    tokens: Tensor  # [S], places among the packed tokens
    tables: Tensor  # [S, blocks]
    mask: Tensor  # [S, 1, 1, C], True where there is a token


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [T, H, Dh], a layer's keys and values, each [blocks, block_size, H, Dh]) → attended values [T, H, Dh]."""

AttentionPlan = Callable[[Sequence[PagedRow], KVCache], Attend]
"""How the rows of a microbatch attend to what the cache holds of them: worked out once for all layers."""


class PagedAttention:
    """The attention of one microbatch, planned once and used by every layer of the stage."""

    def __init__(self, rows: Sequence[PagedRow], cache: KVCache, plan: AttentionPlan | None = None) -> None:
        self._cache = cache
        device = cache.keys.device
        self.positions = torch.cat([torch.arange(row.start, row.end) for row in rows]).to(device)  # [T]
        self._slots = _slots(rows, cache.block_size).to(device)  # [T]
        # A block's last owner may have left NaN behind, which no mask hides: NaN times a weight of 0 is NaN.
        self._begun_blocks = (self._slots[self._slots % cache.block_size == 0]) // cache.block_size
        self._attend = (plan or _WholeContexts)(rows, cache)

    def layer(self, index: int) -> AttentionFn:
        """The attention function of the stage's `index`-th layer; it writes k and v to the cache, then attends."""
        keys, values = self._cache.keys[index], self._cache.values[index]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if v.dtype == torch.float16:
                # An overflow in q or k may make all scores -infinity, and attention over nothing gives zeros. 0 times
                # infinity is NaN: so v + 0 * q * k carries it on to where it is seen, computed in one pass and in fp32.
                v = torch.addcmul(v, q, k, value=0)
            keys[self._begun_blocks] = 0
            values[self._begun_blocks] = 0
            keys.view(-1, *k.shape[1:])[self._slots] = k
            values.view(-1, *v.shape[1:])[self._slots] = v
            return self._attend(q, keys, values)

        return attend


class _WholeContexts:
    """Each row, or group of decoding rows, attends to its whole context at once."""

    def __init__(self, rows: Sequence[PagedRow], cache: KVCache) -> None:
        device = cache.keys.device
        self._chunks: list[_Chunk] = []
        decoding: list[tuple[int, PagedRow]] = []  # (place among the packed tokens, row)
        offset = 0
        for row in rows:
            if row.num_tokens == 1:
                decoding.append((offset, row))
            else:
                self._chunks.append(_plan_chunk(row, offset, device))
            offset += row.num_tokens
        self._decode_groups = [_plan_decode(group, cache) for group in _by_length(decoding)]

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for chunk in self._chunks:
            key, value = (part[chunk.blocks].flatten(0, 1)[: chunk.end] for part in (keys, values))  # [C, H, Dh]
            out[chunk.tokens] = _attend(q[None, chunk.tokens], key[None], value[None], chunk.mask)[0]
        for group in self._decode_groups:
            key, value = (part[group.tables].flatten(1, 2) for part in (keys, values))  # [S, C, H, Dh]
            out[group.tokens] = _attend(q[group.tokens].unsqueeze(1), key, value, group.mask)[:, 0]
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, Tq, H, Dh] over [B, C, H, Dh], in fp32 whatever the dtype: fp16 overflows at long contexts otherwise."""
    heads_first: Callable[[Tensor], Tensor] = lambda x: x.float().transpose(1, 2)  # noqa: E731
    out = F.scaled_dot_product_attention(
        heads_first(q), heads_first(k), heads_first(v), attn_mask=mask, is_causal=mask is None
    )
    return out.transpose(1, 2).to(q.dtype)


def _by_length(decoding: Sequence[tuple[int, PagedRow]]) -> list[list[tuple[int, PagedRow]]]:
    """Rows whose block tables have the same length up to a factor of two: so padding at most doubles what is read,
    and one long sequence among many short ones does not pad them all to its length."""
    groups: dict[int, list[tuple[int, PagedRow]]] = {}
    for entry in decoding:
        groups.setdefault(len(entry[1].block_table).bit_length(), []).append(entry)
    return list(groups.values())


def _plan_decode(group: Sequence[tuple[int, PagedRow]], cache: KVCache) -> _DecodeGroup:
    device = cache.keys.device
    longest = max(len(row.block_table) for _, row in group)
    tables = [[*row.block_table, *[cache.padding_block] * (longest - len(row.block_table))] for _, row in group]
    ends = torch.tensor([row.end for _, row in group])
    mask = torch.arange(longest * cache.block_size) < ends[:, None]
    tokens = torch.tensor([place for place, _ in group], device=device)
    return _DecodeGroup(tokens, torch.tensor(tables, device=device), mask[:, None, None, :].to(device))


def _plan_chunk(row: PagedRow, offset: int, device: torch.device) -> _Chunk:
    mask = None
    if row.start:
        visible = torch.arange(row.end) <= torch.arange(row.start, row.end)[:, None]
        mask = visible[None, None].to(device)
    return _Chunk(slice(offset, offset + row.num_tokens), torch.tensor(row.block_table, device=device), row.end, mask)


def _slots(rows: Sequence[PagedRow], block_size: int) -> Tensor:
    """Where in the flattened cache each packed token's k and v go: [T]."""
    parts = []
    for row in rows:
        positions = torch.arange(row.start, row.end)
        parts.append(torch.tensor(row.block_table)[positions // block_size] * block_size + positions % block_size)
    return torch.cat(parts)
