"""Paged attention: however a sequence is cut, batched and laid out in blocks, it attends as if whole and alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptj_serve.model.attention import KVCache, PagedAttention, PagedRow
from gptj_serve.model.config import GPTJConfig

NUM_HEADS, HEAD_DIM = 2, 4
CONFIG = GPTJConfig(n_embd=NUM_HEADS * HEAD_DIM, n_head=NUM_HEADS, rotary_dim=4, n_positions=64)
QKV = tuple[Tensor, Tensor, Tensor]

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def make_cache(num_blocks: int, block_size: int, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(CONFIG, 1, num_blocks, block_size, dtype, torch.device("cpu"))


def random_qkv(num_tokens: int, seed: int) -> QKV:
    q, k, v = torch.randn(3, num_tokens, NUM_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    return q, k, v


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The textbook, in fp64: [T, H, Dh]."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
    future = torch.ones(len(q), len(q)).triu(1).bool()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v).float()


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, list[int], list[list[tuple[int, int]]]]:
    """(block size, sequence lengths, microbatches of (sequence, number of tokens)) that cover every sequence."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    left = list(lengths)
    microbatches = []
    while any(left):
        riders = draw(st.lists(st.sampled_from([i for i, n in enumerate(left) if n]), min_size=1, unique=True))
        microbatch = [(i, draw(st.integers(1, left[i]) | st.just(1))) for i in riders]
        for i, num_tokens in microbatch:
            left[i] -= num_tokens
        microbatches.append(microbatch)
    return draw(st.integers(1, 7)), lengths, microbatches


@settings(max_examples=60)
@given(schedule=schedules(), seed=st.integers(0, 2**32 - 1))
def test_cached_equals_uncached_and_batched_equals_alone(schedule, seed: int):
    block_size, lengths, microbatches = schedule
    sequences = [random_qkv(length, seed + i) for i, length in enumerate(lengths)]
    blocks = torch.randperm(40 * len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    tables = [blocks[i :: len(lengths)][: -(-length // block_size)] for i, length in enumerate(lengths)]
    cache = make_cache(len(blocks), block_size)
    cache.keys += 1e3  # what earlier owners left
    cache.values += 1e3
    outputs: list[list[Tensor]] = [[] for _ in lengths]
    done = [0] * len(lengths)
    for microbatch in microbatches:
        rows, spans = [], []
        for i, num_tokens in microbatch:
            end = done[i] + num_tokens
            rows.append(PagedRow(done[i], num_tokens, tables[i][: -(-end // block_size)]))
            spans.append((i, slice(done[i], end)))
            done[i] = end
        packed = [torch.cat([sequences[i][part][span] for i, span in spans]) for part in range(3)]
        attended = PagedAttention(rows, cache).layer(0)(*packed)
        for (i, _), part in zip(spans, attended.split([row.num_tokens for row in rows]), strict=True):
            outputs[i].append(part)
    for parts, qkv in zip(outputs, sequences, strict=True):
        torch.testing.assert_close(torch.cat(parts), causal_attention(*qkv), atol=1e-5, rtol=1e-5)


def test_positions_are_those_of_each_row():
    attention = PagedAttention(
        [PagedRow(5, 3, [0, 1]), PagedRow(0, 2, [2]), PagedRow(9, 1, [3, 4, 5])], make_cache(6, 4)
    )
    assert attention.positions.tolist() == [5, 6, 7, 0, 1, 9]


def test_layers_have_caches_of_their_own():
    cache = KVCache(CONFIG, 2, 1, 4, torch.float32, torch.device("cpu"))
    attention = PagedAttention([PagedRow(0, 3, [0])], cache)
    q, k, v = random_qkv(3, 0)
    attention.layer(1)(q, k, v)
    assert not cache.keys[0].any()
    assert torch.equal(cache.keys[1, 0, :3], k)
    assert torch.equal(cache.values[1, 0, :3], v)


@pytest.mark.parametrize("num_tokens", [1, 3], ids=["decode", "chunk"])
def test_nan_of_other_sequences_stays_with_them(num_tokens: int):
    """A failed row may leave NaN in the cache; a mask does not hide it."""
    cache = make_cache(8, 4)
    q, k, v = random_qkv(6, 0)
    expected = causal_attention(q, k, v)
    cache.keys[:, : cache.padding_block] = torch.nan
    cache.values[:, : cache.padding_block] = torch.nan
    start = 6 - num_tokens
    PagedAttention([PagedRow(0, start, [5, 2])], cache).layer(0)(q[:start], k[:start], v[:start])
    longer = PagedRow(9, 1, [0, 1, 3])  # makes the shorter row's table be padded
    rows = [PagedRow(start, num_tokens, [5, 2]), longer]
    q, k, v = (torch.cat([x[start:], torch.ones(1, NUM_HEADS, HEAD_DIM)]) for x in (q, k, v))
    attended = PagedAttention(rows, cache).layer(0)(q, k, v)
    torch.testing.assert_close(attended[:num_tokens], expected[start:], atol=1e-5, rtol=1e-5)


def test_fp16_scores_do_not_overflow():
    """Scores up to 4 * 300 * 300 are beyond fp16's 65504 (transformers #11076)."""
    cache = make_cache(2, 8, torch.float16)
    q, k, v = (x.half() for x in random_qkv(12, 0))
    q, k = q.sign() * 300, k.sign() * 300
    expected = causal_attention(q, k, v)
    attended = PagedAttention([PagedRow(0, 12, [1, 0])], cache).layer(0)(q, k, v)
    assert attended.dtype == torch.float16
    torch.testing.assert_close(attended.float(), expected, atol=2e-3, rtol=2e-3)


# ------------------------------------------------------------------------------------------------- copied blocks


def numbered_cache(num_layers: int, num_blocks: int) -> KVCache:
    cache = KVCache(CONFIG, num_layers, num_blocks, 4, torch.float32, torch.device("cpu"))
    cache.keys.copy_(torch.arange(cache.keys.numel()).view_as(cache.keys))
    cache.values.copy_(-cache.keys)
    return cache


@given(copies=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_copies_are_made_in_every_layer_as_if_one_after_the_other(copies: list[tuple[int, int]]):
    cache, expected = numbered_cache(3, 6), numbered_cache(3, 6)
    cache.copy_blocks(copies)
    for source, target in copies:
        expected.keys[:, target] = expected.keys[:, source].clone()
        expected.values[:, target] = expected.values[:, source].clone()
    assert torch.equal(cache.keys, expected.keys)
    assert torch.equal(cache.values, expected.values)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_overflow_of_float16_reaches_its_own_sequence_alone(part: int, value: float):
    """In q or k of the second of three tokens; the largest finite numbers are no overflow."""
    largest = torch.finfo(torch.float16).max
    qkv = [tensor.half() for tensor in random_qkv(4, seed=0)]
    qkv[0][:, :, 0], qkv[1][:, :, 0] = largest, -largest
    rows = [PagedRow(0, 3, [0]), PagedRow(0, 1, [1])]
    assert PagedAttention(rows, make_cache(2, 4, torch.float16)).layer(0)(*qkv).isfinite().all()
    qkv[part][1, 0, 2] = value
    is_nan = PagedAttention(rows, make_cache(2, 4, torch.float16)).layer(0)(*qkv).isnan().flatten(1).any(1)
    assert is_nan[1:].tolist() == [True, True, False]
