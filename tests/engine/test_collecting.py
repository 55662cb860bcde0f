"""Chunks may come in any order, cut anew and more than once: the whole is the same."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gptj_serve.engine.collecting import SumOverPositions, ValuesByPosition

VALUES = np.arange(1, 61, dtype=np.float32).reshape(20, 3) ** 2


@st.composite
def cuts(draw: st.DrawFn) -> list[tuple[int, int]]:
    """A whole cut of [0, 20), possibly parts of others before it, in any order."""
    spans = []
    for _ in range(draw(st.integers(1, 3))):
        ends = [*sorted(draw(st.sets(st.integers(1, 19)))), 20]
        attempt = list(zip([0, *ends[:-1]], ends, strict=True))
        spans += attempt if not spans else attempt[: draw(st.integers(0, len(attempt)))]
    return draw(st.permutations(spans))


@given(cuts())
def test_any_chunks_make_the_whole(spans: list[tuple[int, int]]):
    by_position, total = ValuesByPosition(20), SumOverPositions(20)
    known: set[int] = set()
    is_summed = False
    for first, last in spans:
        known |= set(range(first, last))
        whole = by_position.add(first, VALUES[first:last])
        assert (whole is not None) == (len(known) == 20)
        if whole is not None:
            np.testing.assert_array_equal(whole, VALUES)
        summed = total.add(first, last, VALUES[first:last].sum(axis=0))
        if summed is not None:
            is_summed = True
            np.testing.assert_array_equal(summed, VALUES.sum(axis=0))
    assert is_summed
