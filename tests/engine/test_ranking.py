"""The best tokens of a row, in an order that depends on nothing but scores and ids."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptj_serve.engine.ranking import best, leading

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def sorted_tokens(row: list[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda token_id: (-row[token_id], token_id))


@given(
    vocab_size=st.integers(1, 150),
    count=st.integers(1, 160),
    num_values=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_best_is_the_beginning_of_a_stable_sort(vocab_size: int, count: int, num_values: int, seed: int):
    """Few values make more ties than are spared for, many make none."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-num_values, num_values, (4, vocab_size), generator=generator) / 8
    scores[3, ::2] = -math.inf
    ranked, token_ids = best(scores, count)
    for row in range(4):
        expected = sorted_tokens(scores[row].tolist())[:count]
        assert ranked[row].tolist() == scores[row, expected].tolist()
        possible = int(scores[row, expected].isfinite().sum())
        assert token_ids[row, :possible].tolist() == expected[:possible]


def test_zeros_of_both_signs_are_equal():
    assert best(torch.tensor([[-0.0, 0.0, -0.0, 1.0]]), 3)[1].tolist() == [[3, 0, 1]]


def test_leading_leaves_only_the_last_ones_open():
    scores = torch.tensor([[0.0] * 50 + [2.0, 1.0, 2.0] + [0.0] * 50])
    ranked, token_ids = leading(scores, 5)
    assert ranked.tolist() == [[2.0, 2.0, 1.0, 0.0, 0.0]]
    assert token_ids[0, :3].tolist() == [50, 52, 51]
    assert token_ids[0, 3] < token_ids[0, 4]
