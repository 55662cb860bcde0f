"""The attention kernels against softmax(q k) v in fp64, in microbatches of all shapes."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from gptj_serve.kernels.gpu.attention import MAX_SPLITS, Attention, choose_num_splits
from gptj_serve.kernels.gpu.rows import DeviceRows
from gptj_serve.kernels.gpu.tiles import Tile, Tiles
from gptj_serve.model.attention import PagedRow
from tests.kernels.gpu.device_rows import device_rows

NUM_BLOCKS = 120
UNTOUCHED = 77.0
TILES = Tiles(Tile(16, 32, 4, 3), Tile(16, 32, 4, 2))


def random_rows(rng: random.Random, spans: Sequence[tuple[int, int]], block_size: int) -> list[PagedRow]:
    """(start, number of tokens) of each; blocks lie anywhere."""
    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    return [PagedRow(start, n, [free.pop() for _ in range(-(-(start + n) // block_size))]) for start, n in spans]


class Case:
    """Queries and a cache with the context of each row; what belongs to no row is NaN."""

    def __init__(
        self, rows: Sequence[PagedRow], num_heads: int, head_dim: int, block_size: int,
        dtype: torch.dtype = torch.float32, seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        shape = (NUM_BLOCKS + 1, num_heads, block_size, head_dim)
        self.rows, self.block_size, self.head_dim, self.dtype = rows, block_size, head_dim, dtype
        self.keys, self.values = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        for row in rows:
            for position in range(row.end):
                block, place = row.block_table[position // block_size], position % block_size
                for cache in (self.keys, self.values):
                    cache[block, :, place] = torch.randn(num_heads, head_dim, generator=generator).to(dtype)
        num_tokens = sum(row.num_tokens for row in rows)
        self.q = torch.randn(num_tokens, num_heads, head_dim, generator=generator).to(dtype)

    def expected(self) -> Tensor:
        """[T, H, Dh] in fp64"""
        parts, first = [], 0
        for row in self.rows:
            q = self.q[first : first + row.num_tokens].double().transpose(0, 1)  # [H, tokens, Dh]
            k, v = (
                cache[row.block_table].transpose(0, 1).flatten(1, 2)[:, : row.end].double()
                for cache in (self.keys, self.values)
            )
            scores = q @ k.transpose(1, 2) / self.head_dim**0.5
            hidden = torch.arange(row.end) > torch.arange(row.start, row.end)[:, None]
            parts.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
            first += row.num_tokens
        return torch.cat(parts)

    def described(self, device: torch.device, *padding: int) -> DeviceRows:
        return device_rows(self.rows, self.block_size, NUM_BLOCKS, device, *padding)

    def attended(self, described: DeviceRows, num_sms: int = 1, tiles: Tiles = TILES) -> Tensor:
        """[T and padding, H, Dh], UNTOUCHED where nothing was written. Rows of queries and outputs lie apart."""
        device = described.slots.device
        num_heads = self.q.shape[1]
        width = num_heads * self.head_dim
        q = torch.full((described.num_tokens, 3 * width), torch.nan, dtype=self.dtype)
        q[: len(self.q), :width] = self.q.flatten(1)
        out = torch.full((described.num_tokens, 2 * width), UNTOUCHED, dtype=self.dtype, device=device)
        attention = Attention(described, num_heads, self.head_dim, self.block_size, tiles, num_sms)
        attention(q.to(device), self.keys.to(device), self.values.to(device), out)
        assert (out[:, width:] == UNTOUCHED).all()
        return out[:, :width].cpu().unflatten(1, (num_heads, -1))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


def random_spans(rng: random.Random) -> list[tuple[int, int]]:
    """Rows that decode and prompt chunks, mixed."""
    spans = []
    for _ in range(rng.randint(1, 5)):
        num_tokens = rng.choice([1, 1, 2, rng.randint(1, 40), 16, 17])
        spans.append((rng.choice([0, rng.randint(0, 90), 16, 31, 32]), num_tokens))
    return spans


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_heads", "head_dim", "block_size"), [(2, 64, 16), (1, 256, 16), (3, 20, 16), (1, 8, 4), (2, 128, 32)]
)
def test_random_microbatches(
    num_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    rng = random.Random(f"{head_dim} {dtype}")
    for seed in range(2):
        rows = random_rows(rng, random_spans(rng), block_size)
        case = Case(rows, num_heads, head_dim, block_size, dtype, seed)
        attended = case.attended(
            case.described(device, *(rng.randint(0, 5) for _ in range(3))), num_sms=rng.randint(1, 9)
        )
        assert_close(attended[: len(case.q)], case.expected())
        assert (attended[len(case.q) :] == UNTOUCHED).all()  # padding tokens are left alone


@pytest.mark.parametrize("block_size", [8, 16])
def test_contexts_that_end_where_blocks_and_tiles_end(block_size: int, device: torch.device) -> None:
    contexts = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65]
    rows = random_rows(random.Random(0), [(n - 1, 1) for n in contexts], block_size)
    case = Case(rows, 1, 16, block_size)
    for num_sms in (1, 40):
        assert_close(case.attended(case.described(device), num_sms), case.expected())
    chunks = random_rows(
        random.Random(0), [(n - 2, 2) for n in contexts[1:]] + [(0, 16), (16, 16), (1, 31)], block_size
    )
    case = Case(chunks, 1, 16, block_size)
    assert_close(case.attended(case.described(device)), case.expected())


def test_a_long_context_is_split_and_joined(device: torch.device) -> None:
    """With as many splits as have work, and with more."""
    case = Case(random_rows(random.Random(0), [(499, 1), (0, 1), (99, 1)], 16), 2, 32, 16)
    described = case.described(device)
    for num_sms in (1, 9, 60):
        assert_close(case.attended(described, num_sms), case.expected())


def test_a_microbatch_for_chunks_may_have_none(device: torch.device) -> None:
    """As a graph that was captured for rows of up to 64 tokens."""
    case = Case(random_rows(random.Random(0), [(40, 1), (3, 1)], 16), 2, 16, 16)
    described = replace(case.described(device, 62, 2, 1), max_row_tokens=64)
    assert_close(case.attended(described)[:2], case.expected())


def test_rows_share_blocks(device: torch.device) -> None:
    table = [5, 9, 2]
    rows = [PagedRow(32, 16, table), PagedRow(0, 1, [5]), PagedRow(20, 1, [5, 9]), PagedRow(30, 2, [5, 9])]
    case = Case(rows[:1], 2, 16, 16)
    case.rows = rows
    case.q = torch.randn(20, 2, 16, generator=torch.Generator().manual_seed(1))
    assert_close(case.attended(case.described(device)), case.expected())


def test_scores_far_apart_and_far_from_zero(device: torch.device) -> None:
    case = Case(random_rows(random.Random(0), [(70, 1), (40, 20)], 16), 1, 32, 16)
    case.q *= 300  # of scores as large as that fp32 has four digits behind the point
    attended = case.attended(case.described(device), num_sms=9)
    torch.testing.assert_close(attended.double(), case.expected(), atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
def test_infinite_scores_are_seen(infinity: float, device: torch.device) -> None:
    """Of one row; the others stay as they are."""
    case = Case(random_rows(random.Random(0), [(70, 1), (10, 1), (4, 3), (4, 3)], 16), 1, 16, 16)
    case.keys.abs_()
    case.q[[0, 3]] = infinity
    attended = case.attended(case.described(device), num_sms=9)
    assert attended[[0, 3]].isnan().all()
    assert attended[[1, 2, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize(
    ("num_rows", "max_context", "expected"),
    [
        (1, 2048, 17),
        (8, 2048, 4),
        (16, 2048, 4),
        (256, 2048, 4),
        (256, 256, 1),
        (1, 16, 1),
        (1, 100, 2),
        (1, 1 << 20, MAX_SPLITS),
    ],
)
def test_splits_fill_the_device_and_bound_the_longest_row(num_rows: int, max_context: int, expected: int) -> None:
    assert choose_num_splits(num_rows, 16, max_context, num_sms=132, span=64) == expected
