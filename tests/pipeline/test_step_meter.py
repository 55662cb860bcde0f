"""`StepMeter` under a clock that the test moves."""

from typing import Any

import pytest

from gptj_serve.pipeline.step_meter import NUM_STEPS_SHOWN, StepMeter
from gptj_serve.steps import MicroBatch, Row


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def microbatch(index: int, *lengths: int, traceparents: list[str] | None = None) -> MicroBatch:
    return MicroBatch(index, [Row([1] * length, 0, [0]) for length in lengths or (1,)], [], traceparents or [])


class MeteredStage:
    """Steps of given durations, on hidden states sent at given times."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.meter = StepMeter(self.clock)

    def step(self, microbatch: MicroBatch, duration_s: float, sent_at: float | None = None) -> None:
        self.meter.begin(sent_at)
        self.clock.now += duration_s
        self.meter.end(microbatch)
        self.meter.wait()


@pytest.fixture
def stage() -> MeteredStage:
    return MeteredStage()


def test_steps_are_shown_with_their_rows_and_tokens(stage: MeteredStage) -> None:
    stage.step(microbatch(7, 3, 1), 0.25)
    stage.clock.now += 1
    stage.step(microbatch(8), 0.5)
    assert stage.meter.status()["steps"] == [
        {"microbatch_id": 7, "started_at": 1000.0, "duration_s": 0.25, "num_rows": 2, "num_tokens": 4},
        {"microbatch_id": 8, "started_at": 1001.25, "duration_s": 0.5, "num_rows": 1, "num_tokens": 1},
    ]


def test_only_the_newest_are_shown_but_all_of_the_last_second_count(stage: MeteredStage) -> None:
    for index in range(200):
        stage.step(microbatch(index), 1 / 256)
        stage.clock.now += 1 / 256
    status = stage.meter.status()
    assert [step["microbatch_id"] for step in status["steps"]] == list(range(200 - NUM_STEPS_SHOWN, 200))
    assert status["busy_ratio"] == 0.5
    assert stage.meter.totals()["num_steps"] == 200
    assert stage.meter.totals()["busy_s"] == 200 / 256


def test_busy_is_what_lies_in_the_last_second(stage: MeteredStage) -> None:
    assert stage.meter.status()["busy_ratio"] == 0
    stage.step(microbatch(0), 2.0)
    assert stage.meter.status()["busy_ratio"] == 1
    stage.clock.now += 0.75
    assert stage.meter.status()["busy_ratio"] == 0.25
    stage.clock.now += 0.25
    assert stage.meter.status()["busy_ratio"] == 0


def test_the_step_at_hand_counts_until_it_is_given_up(stage: MeteredStage) -> None:
    stage.meter.begin(None)
    stage.clock.now += 0.5
    assert stage.meter.status()["busy_ratio"] == 0.5
    assert stage.meter.status()["steps"] == []
    stage.meter.wait()
    assert stage.meter.status()["busy_ratio"] == 0


@pytest.mark.parametrize(
    ("sent_at", "handoff_s"),
    [
        (1000.5, 0.5),  # the stage waited for it
        (999.0, 1.0),  # it waited for the stage until that was ready, at 1000.0
        (1001.5, 0.0),  # by the sender's clock it is yet to be sent
        (None, None),
    ],
)
def test_a_handoff_is_the_time_that_both_sides_spent_on_it(
    stage: MeteredStage, sent_at: float | None, handoff_s: float | None
) -> None:
    stage.meter.wait()
    stage.clock.now = 1001.0
    stage.step(microbatch(0), 0.25, sent_at)
    assert stage.meter.status()["handoff_s"] == handoff_s
    assert stage.meter.totals()["handoff_s"] == (handoff_s or 0.0)
    assert stage.meter.totals()["num_handoffs"] == (handoff_s is not None)


def test_traced_steps_are_told_once(stage: MeteredStage) -> None:
    stage.step(microbatch(0), 0.25)
    stage.step(microbatch(1, traceparents=["a", "b"]), 0.5)
    ((step, traceparents),) = stage.meter.take_traced()
    assert (step.microbatch_id, step.started_at, step.ended_at, traceparents) == (1, 1000.25, 1000.75, ["a", "b"])
    assert stage.meter.take_traced() == []


def test_steps_are_forgotten_when_the_clock_was_set_back(stage: MeteredStage) -> None:
    stage.step(microbatch(0), 0.25)
    stage.clock.now -= 3600
    for index in range(1000):
        stage.step(microbatch(index), 1 / 256)
    assert len(stage.meter._steps) == 256 + 1  # those of the last second
    assert stage.meter.status()["busy_ratio"] == 1


def test_time_that_goes_back_is_never_negative(stage: MeteredStage) -> None:
    stage.step(microbatch(0), -5.0, sent_at=2000.0)
    status: dict[str, Any] = stage.meter.status()
    assert status["steps"][0]["duration_s"] == 0
    assert status["handoff_s"] == 0
    assert status["busy_ratio"] == 0
