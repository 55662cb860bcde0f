"""The figures that are reported, against values worked out by hand."""

import numpy as np
import pytest

from gptj_serve.fit.metrics import accuracy, exact_match_and_f1, macro_f1, majority


def flags(*rows: str) -> np.ndarray:
    return np.array([[character == "x" for character in row] for row in rows])


def test_accuracy_and_macro_f1():
    actual = flags("x...", ".x..", "x...", "..x.")
    predicted = flags("x...", "x...", "x...", "..x.")
    assert accuracy(predicted, actual) == 0.75
    assert macro_f1(predicted, actual) == pytest.approx((0.8 + 0.0 + 1.0) / 3)  # the last label has none
    assert macro_f1(flags("."), flags(".")) == 0


def test_majority_is_the_most_frequent_set():
    np.testing.assert_array_equal(majority(flags("x.", "xx", "xx"), 2), flags("xx", "xx"))


@pytest.mark.parametrize(
    ("predicted", "answers", "expected"),
    [
        ("The Cat!", ["cat"], (1, 1)),
        ("black cat", ["dog", "a cat"], (0, 2 / 3)),
        ("dog", ["cat"], (0, 0)),
        ("", [], (1, 1)),
        ("dog", [], (0, 0)),
        ("", ["cat"], (0, 0)),
    ],
)
def test_answers_count_as_in_squad(predicted: str, answers: list[str], expected: tuple[float, float]):
    assert exact_match_and_f1(predicted, answers) == pytest.approx(expected)
