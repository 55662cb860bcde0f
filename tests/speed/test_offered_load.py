"""What benchmarks offer: all of it, or nothing."""

import random
from collections.abc import Callable

import pytest
import typer

from benchmarks.number_lists import positive_numbers
from benchmarks.overload import check_loads
from benchmarks.speed.load import Shape, compressed

SHAPES: list[Shape] = [(2.0 * index, 10 + index, 1) for index in range(100)]


def test_a_slice_of_the_trace_has_its_arrivals_in_shorter_time():
    offered = compressed(SHAPES, 2.5, 10.0, random.Random(0))
    assert [arrival_s for arrival_s, _, _ in offered] == pytest.approx([0.4 * index for index in range(25)])
    assert [prompt - offered[0][1] for _, prompt, _ in offered] == list(range(25))


def test_no_load_is_cut_short():
    assert len(compressed(SHAPES, 9.9, 10.0, random.Random(0))) == 99
    with pytest.raises(ValueError, match="rate=10 for 10 s takes 100 requests; the trace has 100"):
        compressed(SHAPES, 10.0, 10.0, random.Random(0))
    check_loads(SHAPES, [0.5, 1.0, 9.9], sustainable=1.0, seconds=10.0)
    with pytest.raises(SystemExit, match="a load of 10x can't be offered: rate=20 for 10 s takes 200 requests"):
        check_loads(SHAPES, [0.5, 1.0, 10.0], sustainable=2.0, seconds=10.0)


def test_a_load_of_one_request():
    (only,) = compressed(SHAPES, 0.01, 10.0, random.Random(0))
    assert only[0] == 0.0


def test_a_service_that_finishes_nothing_ends_the_run():
    with pytest.raises(SystemExit, match="finished no request in 5 s: --seconds=10 is too short"):
        check_loads(SHAPES, [1.0], sustainable=0.0, seconds=10.0)


def test_lists_of_numbers():
    assert positive_numbers("--rates", "0.05,1,2e1", float) == [0.05, 1.0, 20.0]
    assert positive_numbers("--peer-batches", "1,8", int) == [1, 8]


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        ("1,x", float, "'x' is no number above 0"),
        ("0.1,0", float, "'0' is no number above 0"),
        ("inf", float, "'inf' is no number above 0"),
        ("nan", float, "'nan' is no number above 0"),
        ("", float, "'' is no number above 0"),
        ("1,0.5", int, "'0.5' is no whole number above 0"),
        ("-1", int, "'-1' is no whole number above 0"),
    ],
)
def test_what_is_no_list_of_numbers(text: str, number: Callable[[str], float], message: str):
    with pytest.raises(typer.BadParameter) as refused:
        positive_numbers("--loads", text, number)
    assert refused.value.message == message
    assert refused.value.param_hint == "--loads"
