import math

import pytest

from gptj_serve.profiling.percentile import percentile


def test_between_the_nearest_values():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.5) == 1.5
    assert percentile(range(101), 0.99) == pytest.approx(99)
    assert percentile([7.0], 0.99) == 7.0


def test_of_nothing():
    assert math.isnan(percentile([], 0.5))
    assert percentile([], 0.99, of_nothing=0.0) == 0.0
