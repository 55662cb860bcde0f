"""What is counted elsewhere, as counters. What Prometheus reads of all metrics is in `test_operators`."""

import pytest

from gptj_serve.serving.metrics import RunningTotal


class FakeCounter:
    def __init__(self) -> None:
        self.increases: list[tuple[float, dict[str, str] | None]] = []

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert value > 0  # as Ray's asks for
        self.increases.append((value, tags))


@pytest.fixture
def counter() -> FakeCounter:
    return FakeCounter()


def test_a_counter_follows_a_total(counter: FakeCounter) -> None:
    total = RunningTotal(counter)  # type: ignore[arg-type]
    for value in (0, 3, 3, 10):
        total.advance_to(value)
    assert counter.increases == [(3, None), (7, None)]


def test_a_total_that_began_again_loses_nothing(counter: FakeCounter) -> None:
    total = RunningTotal(counter)  # type: ignore[arg-type]
    for value in (5, 2, 0, 4):  # a stage's process was replaced, twice
        total.advance_to(value)
    assert counter.increases == [(5, None), (2, None), (4, None)]


def test_totals_of_several_stages_are_kept_apart(counter: FakeCounter) -> None:
    total = RunningTotal(counter, "stage")  # type: ignore[arg-type]
    for value, stage in ((1.5, "0"), (1.0, "1"), (2.0, "0"), (1.0, "1")):
        total.advance_to(value, stage)
    assert counter.increases == [(1.5, {"stage": "0"}), (1.0, {"stage": "1"}), (0.5, {"stage": "0"})]
