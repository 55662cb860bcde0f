"""Under overload: how long a request would wait is known, who would wait too long is refused, who is late not begun."""

import random
from collections import Counter

import msgspec
import pytest
from fake_stages import FakeStages, generate_request, head_request, make_scheduler

from gptj_serve.engine.backlog import FIRST_COST, HALF_LIFE_S, MAX_COST, MIN_OBSERVED_S, StepCosts, Work, WorkRate
from gptj_serve.engine.scheduler import Scheduler
from gptj_serve.errors import OverloadedError
from gptj_serve.types import PRIORITY_STEP, EngineRequest, Event, FailureEvent, Task, TokenEvent


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def rate_after(*steps: tuple[float, int, bool]) -> WorkRate:
    """Of (seconds since the last mark, tokens done in them, saturated from here on)."""
    rate, now = WorkRate(), 0.0
    rate.mark(now, is_saturated=True)
    for elapsed_s, num_tokens, is_saturated in steps:
        rate.add(Work(num_tokens))
        now += elapsed_s
        rate.mark(now, is_saturated=is_saturated)
    return rate


def test_a_rate_is_known_after_some_time_under_load():
    assert rate_after((MIN_OBSERVED_S / 2, 100, True)).seconds_for(Work(1000), FIRST_COST) == 0
    rate = rate_after((2.0, 100, True), (2.0, 300, True))
    assert rate.seconds_for(Work(1000), FIRST_COST) == pytest.approx(10, rel=0.1)
    assert rate_after((2.0, 100, True)).seconds_for(Work(0), FIRST_COST) == 0


def test_only_time_under_load_counts():
    rate = rate_after((2.0, 200, True), (0.0, 0, False), (50.0, 1, False), (50.0, 1, True), (2.0, 200, True))
    assert rate.seconds_for(Work(1000), FIRST_COST) == pytest.approx(10)


def test_a_rate_follows_what_the_engine_does_now():
    steps = [(1.0, 1000, True)] * 100 + [(1.0, 10, True)] * int(4 * HALF_LIFE_S)
    assert 1000 / rate_after(*steps).seconds_for(Work(1000), FIRST_COST) == pytest.approx(10 + 990 / 16, rel=0.01)


def test_an_outage_says_nothing_of_the_rate():
    rate = rate_after((2.0, 200, True))
    rate.add(Work(3))
    rate.pause()
    rate.mark(60.0, is_saturated=True)
    rate.add(Work(100))
    rate.mark(61.0, is_saturated=True)
    assert rate.seconds_for(Work(1000), FIRST_COST) == pytest.approx(10)


def test_an_engine_that_does_nothing_has_an_endless_queue():
    assert rate_after((60.0, 0, True)).seconds_for(Work(10), FIRST_COST) > 500


def test_generated_tokens_count_by_what_they_cost():
    rate = WorkRate()
    rate.mark(0.0, is_saturated=True)
    rate.add(Work(100, 30))
    rate.mark(2.0, is_saturated=True)
    assert rate.seconds_for(Work(100, 10), cost=10) == pytest.approx(1.0)
    assert rate.seconds_for(Work(0, 40), cost=10) == pytest.approx(2.0)


@pytest.mark.parametrize("cost", [1.0, 6.5, 80.0])
def test_the_cost_of_a_generated_token_is_learned_from_the_steps(cost: float):
    costs, rng = StepCosts(), random.Random(1)
    for work in [Work(0, 8), Work(8, 0)] * 3 + [Work(rng.randrange(500), rng.randrange(20)) for _ in range(50)]:
        costs.observe(work, (work.prompt + cost * work.new) * 1e-4 * rng.uniform(0.9, 1.1))
    assert costs.cost == pytest.approx(cost, rel=0.2)


def test_from_steps_that_are_all_alike_no_cost_is_learned():
    costs = StepCosts()
    for _ in range(100):
        costs.observe(Work(0, 8), 0.1)
        costs.observe(Work(), 0.0)
    assert costs.cost == FIRST_COST
    for _ in range(1000):  # prompt tokens that cost nothing beside the rest
        costs.observe(Work(500, 1), 0.1)
        costs.observe(Work(0, 1), 0.1)
    assert costs.cost == MAX_COST


# ------------------------------------------------------------------------------------------------ in the scheduler

STEP_S = 0.1


def busy_scheduler(clock: Clock, num_requests: int = 40, **limits: float) -> tuple[Scheduler, FakeStages]:
    """Has run for some seconds, two sequences at a time, with others waiting."""
    scheduler = make_scheduler(num_blocks=8, max_num_sequences=2, clock=clock, **limits)
    stages = FakeStages(4)
    for index in range(num_requests):
        scheduler.add(generate_request(f"first-{index}", [1, 2], max_new_tokens=4, ignore_eos=True))
    run(scheduler, stages, clock, 20)
    return scheduler, stages


def run(scheduler: Scheduler, stages: FakeStages, clock: Clock, num_steps: int) -> list[Event]:
    events = []
    for _ in range(num_steps):
        microbatch = scheduler.schedule()
        events += scheduler.take_failures()
        clock.now += STEP_S
        if microbatch is not None:
            events += scheduler.update(stages.run(microbatch))
    scheduler.check_integrity()
    return events


def first_token_after(scheduler: Scheduler, stages: FakeStages, clock: Clock, request: EngineRequest) -> float:
    scheduler.add(request)
    added_at = clock.now
    while not any(event.request_id == request.request_id for event in run(scheduler, stages, clock, 1)):
        assert clock.now < added_at + 100
    return clock.now - added_at


def test_the_wait_is_foretold():
    scheduler, stages = busy_scheduler(clock := Clock())
    foretold_s = scheduler.queue_wait_s()
    assert 4 < foretold_s < 10
    waited_s = first_token_after(scheduler, stages, clock, generate_request("late", [5]))
    assert waited_s == pytest.approx(foretold_s, rel=0.2)


def test_the_wait_is_foretold_by_priority():
    scheduler, stages = busy_scheduler(clock := Clock())
    assert scheduler.queue_wait_s(priority=-1) == 0  # sooner than all that wait
    assert scheduler.queue_wait_s(priority=1) == scheduler.queue_wait_s()
    scheduler.add(generate_request("behind", [1], priority=PRIORITY_STEP))
    assert scheduler.queue_wait_s(priority=PRIORITY_STEP) > scheduler.queue_wait_s()
    assert first_token_after(scheduler, stages, clock, generate_request("sooner", [5], priority=-1)) < 1


def test_answers_that_end_early_count_as_done():
    """Of each answer a quarter is generated: without that the queue would seem four times as long as it is."""
    scheduler = make_scheduler(num_blocks=8, max_num_sequences=2, clock=(clock := Clock()))
    stages = FakeStages(4)

    def request(name: str) -> EngineRequest:
        return generate_request(name, [1, 2], max_new_tokens=16, stop_token_ids=list(range(11)))

    for index in range(100):
        scheduler.add(request(str(index)))
    run(scheduler, stages, clock, 20)
    foretold_s = scheduler.queue_wait_s()
    assert first_token_after(scheduler, stages, clock, request("late")) == pytest.approx(foretold_s, rel=0.2)


def test_work_without_generation_is_counted_too():
    scheduler = make_scheduler(max_microbatch_tokens=8, clock=(clock := Clock()))
    stages = FakeStages(4)
    for index in range(100):
        scheduler.add(head_request(str(index), Task.CLASSIFY, [index % 11, index // 11] * 4))
    run(scheduler, stages, clock, 20)
    foretold_s = scheduler.queue_wait_s()
    assert 7 < foretold_s < 9
    late = head_request("late", Task.CLASSIFY, [9])
    assert first_token_after(scheduler, stages, clock, late) == pytest.approx(foretold_s, rel=0.1)


def test_who_would_wait_too_long_is_refused():
    scheduler, _ = busy_scheduler(Clock(), max_queue_wait_s=2.0)
    wait_s = scheduler.queue_wait_s()
    with pytest.raises(
        OverloadedError, match=r"would wait for about \d s, longer than the service's limit of 2 s"
    ) as e:
        scheduler.add(generate_request("late", [1]))
    assert e.value.retry_after_s == pytest.approx(wait_s - 2)
    scheduler.check_integrity()
    scheduler.add(generate_request("sooner", [1], priority=-1))  # does not wait for the others
    scheduler.add(resumed := msgspec.structs.replace(generate_request("resumed", [1]), is_admitted=True))
    assert resumed.is_admitted


def test_who_has_no_time_to_wait_is_refused():
    scheduler, _ = busy_scheduler(Clock())
    late = generate_request("late", [1])
    with pytest.raises(OverloadedError, match=r"longer than the time of 1\.5 s that it has"):
        scheduler.add(msgspec.structs.replace(late, time_left_s=1.5))
    scheduler.add(msgspec.structs.replace(late, time_left_s=60.0))


def test_an_empty_queue_refuses_nobody():
    scheduler, stages = busy_scheduler(clock := Clock(), max_queue_wait_s=0.001)
    run(scheduler, stages, clock, 1000)
    assert not scheduler.has_work
    scheduler.add(msgspec.structs.replace(generate_request("a", [1]), time_left_s=0.01))
    assert scheduler.num_waiting == 1


def test_the_wait_after_an_outage_is_foretold_as_before():
    scheduler, stages = busy_scheduler(clock := Clock())
    before_s = scheduler.queue_wait_s()
    scheduler.schedule()
    scheduler.reset()
    stages.restart()
    clock.now += 30
    run(scheduler, stages, clock, 3)
    assert scheduler.queue_wait_s() == pytest.approx(before_s, rel=0.2)


def test_who_is_late_is_not_begun():
    """The rate was not known when they came, so they were let in."""
    scheduler = make_scheduler(num_blocks=8, max_num_sequences=1, clock=(clock := Clock()))
    stages = FakeStages(4)
    for name, time_left_s in (("begun", 1.0), ("late", 1.0), ("patient", None), ("in time", 30.0)):
        request = generate_request(name, [1, 2], max_new_tokens=20, ignore_eos=True)
        scheduler.add(msgspec.structs.replace(request, time_left_s=time_left_s))
    events = run(scheduler, stages, clock, 100)
    (failure,) = [event for event in events if isinstance(event, FailureEvent)]
    assert failure.request_id == "late"
    assert failure.message == "it was not the request's turn yet when its time to wait was over, after 1.1 s"
    assert failure.retry_after_s is not None
    num_tokens = [sum(isinstance(e, TokenEvent) and e.request_id == name for e in events) for name in ("begun", "late")]
    assert num_tokens == [20, 0]
    assert {event.request_id for event in events} == {"begun", "late", "patient", "in time"}
    assert not scheduler.has_work


def test_nobody_waits_for_longer_than_the_limit():
    """However wrong the estimate was: before the first tokens it lets everybody in."""
    scheduler = make_scheduler(num_blocks=8, max_num_sequences=1, max_queue_wait_s=1.0, clock=(clock := Clock()))
    stages = FakeStages(4)
    for name in ("begun", "late"):
        request = generate_request(name, [1, 2], max_new_tokens=20, ignore_eos=True)
        scheduler.add(msgspec.structs.replace(request, time_left_s=60.0))
    another = generate_request("moved here", [1, 2], max_new_tokens=20, ignore_eos=True)
    scheduler.add(msgspec.structs.replace(another, is_admitted=True))
    events = run(scheduler, stages, clock, 100)
    (failure,) = [event for event in events if isinstance(event, FailureEvent)]
    assert (failure.request_id, failure.retry_after_s is None) == ("late", False)
    assert Counter(e.request_id for e in events if isinstance(e, TokenEvent)) == {"begun": 20, "moved here": 20}
    assert not scheduler.has_work


def test_who_was_begun_is_not_given_up_for_being_late():
    """Preempted, or taken over from another pipeline."""
    scheduler = make_scheduler(num_blocks=8, max_num_sequences=1, clock=(clock := Clock()))
    stages = FakeStages(4)
    first = generate_request("first", [1], max_new_tokens=8, ignore_eos=True)
    scheduler.add(msgspec.structs.replace(first, time_left_s=0.5))
    run(scheduler, stages, clock, 2)
    resumed = generate_request("resumed", [1], max_new_tokens=8, ignore_eos=True)
    scheduler.add(msgspec.structs.replace(resumed, time_left_s=0.1, is_admitted=True))
    scheduler.reset()
    clock.now += 60
    events = run(scheduler, stages, clock, 30)
    assert not any(isinstance(event, FailureEvent) for event in events)
    assert not scheduler.has_work


def test_the_load_says_how_long_the_backlog_lasts():
    clock = Clock()
    scheduler, stages = busy_scheduler(clock)
    load = scheduler.load()
    assert (load.kv_share, load.num_waiting) == (scheduler.blocks.num_used / 8, scheduler.num_waiting)
    assert load.num_waiting * 6 <= load.num_tokens_waiting <= (load.num_waiting + 2) * 6
    began_at = clock.now
    while scheduler.has_work:
        run(scheduler, stages, clock, 1)
    assert load.num_tokens_waiting / load.tokens_per_s == pytest.approx(clock.now - began_at, rel=0.15)
    assert scheduler.load() == (0, 0.0, 0.0, 0, 0)


def test_without_a_queue_so_far_the_load_has_no_speed():
    clock = Clock()
    scheduler = make_scheduler(clock=clock)
    scheduler.add(generate_request("only", [1, 2], max_new_tokens=4, ignore_eos=True))
    run(scheduler, FakeStages(4), clock, 2)
    load = scheduler.load()
    # two to be generated, and the newest one to be computed
    assert (load.num_tokens_waiting, load.tokens_per_s, load.num_waiting, load.num_running) == (3, 0.0, 0, 1)
    assert load.kv_share == 1 / 64
