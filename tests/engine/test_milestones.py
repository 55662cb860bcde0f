"""What the scheduler tells of its requests, and what it says about them in the log."""

import logging
from typing import Any

import msgspec
import pytest
from fake_stages import FakeStages, generate_request, head_request, make_scheduler

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.milestones import Milestone
from gptj_serve.engine.rate import Rate
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.steps import RowResult, StepOutput
from gptj_serve.types import EngineRequest, Task


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A scheduler whose milestones are kept, over a pool of `num_blocks` blocks of four tokens."""

    def __init__(self, num_blocks: int = 8) -> None:
        self.told: list[tuple[Milestone, str, float]] = []
        self.clock = Clock()
        limits = SchedulerLimits(
            num_stages=1, max_num_sequences=8, max_microbatch_tokens=64, max_sequence_tokens=4 * num_blocks
        )
        self.scheduler = Scheduler(
            limits, KVBlocks(num_blocks, 4, reuse_prefixes=False), frozenset(), self.clock, self._tell
        )
        self.stages = FakeStages(4)

    def _tell(self, milestone: Milestone, request: EngineRequest, elapsed_s: float) -> None:
        self.told.append((milestone, request.request_id, elapsed_s))

    def step(self, seconds: float = 1.0) -> Any:
        microbatch = self.scheduler.schedule()
        assert microbatch is not None
        self.clock.now += seconds
        self.scheduler.update(self.stages.run(microbatch))
        return microbatch

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()


def test_the_time_in_the_queue_is_told_once() -> None:
    watched = Watched(num_blocks=2)
    watched.scheduler.add(generate_request("a", [1] * 4, max_new_tokens=4))
    watched.clock.now += 3
    watched.step()
    watched.scheduler.add(generate_request("b", [1] * 4, max_new_tokens=2))
    watched.finish()
    assert watched.told[:3] == [
        (Milestone.QUEUED, "a", 0.0),
        (Milestone.SCHEDULED, "a", 3.0),
        (Milestone.QUEUED, "b", 0.0),
    ]
    assert [milestone for milestone, request_id, _ in watched.told if request_id == "b"].count(Milestone.SCHEDULED) == 1


def test_a_preempted_request_is_admitted() -> None:
    watched = Watched(num_blocks=3)
    for name in "ab":
        watched.scheduler.add(generate_request(name, [1] * 4, max_new_tokens=8, ignore_eos=True))
    watched.finish()
    milestones = [milestone for milestone, request_id, _ in watched.told if request_id == "b"]
    assert milestones[:2] == [Milestone.QUEUED, Milestone.SCHEDULED]
    assert set(milestones[2::2]) == {Milestone.PREEMPTED}
    assert set(milestones[3::2]) == {Milestone.RESUMED}
    assert milestones.count(Milestone.PREEMPTED) == watched.scheduler.num_preemptions > 0
    assert all(elapsed_s > 0 for milestone, _, elapsed_s in watched.told if milestone is Milestone.RESUMED)


def test_prompt_tokens_are_counted() -> None:
    scheduler = make_scheduler()
    scheduler.add(generate_request("a", [1] * 5, max_new_tokens=1))
    scheduler.add(generate_request("b", [1] * 7, max_new_tokens=1))
    scheduler.add(head_request("c", Task.SCORE, [1] * 4, continuation=[2] * 3))
    assert scheduler.num_prompt_tokens == 5 + 7 + (4 + 3)


def test_a_microbatch_names_the_spans_of_its_traced_sequences() -> None:
    watched = Watched()
    for name, traceparent in (("a", ""), ("b", "span-b"), ("c", "span-c")):
        request = generate_request(name, [1], max_new_tokens={"a": 9, "b": 3, "c": 2}[name], ignore_eos=True)
        watched.scheduler.add(msgspec.structs.replace(request, traceparent=traceparent))
    traceparents = []
    while watched.scheduler.has_work:
        traceparents.append(watched.step().traceparents)
    assert traceparents[:4] == [["span-b", "span-c"], ["span-b", "span-c"], ["span-b"], []]


@pytest.mark.parametrize(("is_kv_suspect", "level"), [(True, logging.WARNING), (False, logging.INFO)])
def test_a_failed_row_is_logged_with_its_request(
    caplog: pytest.LogCaptureFixture, is_kv_suspect: bool, level: int
) -> None:
    caplog.set_level(logging.INFO, "gptj_serve")
    watched = Watched()
    watched.scheduler.add(generate_request("req-1", [1], max_new_tokens=4))
    microbatch = watched.scheduler.schedule()
    assert microbatch is not None
    assert watched.scheduler.request_ids_in_flight() == {0: ["req-1"]}
    watched.scheduler.update(StepOutput(0, [RowResult(failure="not finite", is_kv_suspect=is_kv_suspect)]))
    (line,) = caplog.records
    assert line.getMessage() == "request req-1 failed on the last stage: not finite"
    assert (line.levelno, vars(line)["request_id"]) == (level, "req-1")


def test_preemptions_are_told_to_those_who_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "gptj_serve")
    watched = Watched(num_blocks=3)
    for name in ("req-1", "req-2"):
        watched.scheduler.add(generate_request(name, [1] * 4, max_new_tokens=8, ignore_eos=True))
    watched.finish()
    assert {vars(line)["request_id"] for line in caplog.records} == {"req-2"}
    assert len(caplog.records) == watched.scheduler.num_preemptions


def test_a_rate_is_of_the_last_second() -> None:
    clock = Clock()
    rate = Rate(clock)
    assert rate.per_second() == 0
    rate.add(3)
    clock.now += 0.5
    rate.add(4)
    assert rate.per_second() == 7
    clock.now += 0.75
    assert rate.per_second() == 4
    clock.now += 1
    assert rate.per_second() == 0
