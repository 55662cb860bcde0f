import random
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_serve.scaling.policy import DOWN_SHARE, PipelineLoad, ScalingLimits, ScalingPolicy

LIMITS = ScalingLimits(
    min_pipelines=1,
    max_pipelines=8,
    target_drain_s=10.0,
    target_kv_share=0.8,
    upscale_delay_s=2.0,
    downscale_delay_s=60.0,
    scale_to_zero_delay_s=300.0,
)
IDLE = PipelineLoad(num_tokens_waiting=0, tokens_per_s=0.0, kv_share=0.0, num_waiting=0, num_running=0)


def backlog(num_tokens: int, num_waiting: int = 50) -> PipelineLoad:
    """At 100 tokens/s, so that one pipeline should have 1000 at most."""
    return PipelineLoad(num_tokens, 100.0, 0.5, num_waiting, num_running=8)


class Service:
    """Pipelines that start and stop at once; `tell` lets a second pass with a load, spread over those that run."""

    def __init__(self, limits: ScalingLimits = LIMITS, num_pipelines: int = 1) -> None:
        self.policy = ScalingPolicy(limits)
        self.now_s = 1000.0
        self.num_pipelines = num_pipelines
        self.changes: list[tuple[float, int]] = []  # seconds since the start and the new number

    def tell(self, total: PipelineLoad, num_s: int = 1, num_without_pipeline: int = 0) -> int:
        for _ in range(num_s):
            num = self.num_pipelines
            each = total._replace(
                num_tokens_waiting=total.num_tokens_waiting // max(num, 1),
                kv_share=total.kv_share / max(num, 1),
                num_waiting=total.num_waiting // max(num, 1),
                num_running=ceil(total.num_running / max(num, 1)),
            )
            target = self.policy.decide(self.now_s, [each] * num, num, num_without_pipeline)
            if target != num:
                self.changes.append((self.now_s - 1000.0, target))
            self.num_pipelines = target
            self.now_s += 1.0
        return self.num_pipelines


def test_a_backlog_is_followed_all_the_way_after_the_short_delay() -> None:
    service = Service()
    service.tell(backlog(4500), 10)
    assert service.changes == [(2.0, 5)]


def test_a_backlog_shorter_than_the_delay_changes_nothing() -> None:
    service = Service()
    service.tell(backlog(4500), 2)
    service.tell(backlog(100), 2)
    service.tell(backlog(4500), 2)
    assert service.changes == []


def test_it_goes_up_to_what_was_needed_all_the_time() -> None:
    service = Service()
    for num_tokens in (2500, 7500, 3500):
        service.tell(backlog(num_tokens))
    assert service.changes == [(2.0, 3)]


def test_kv_in_use_is_spread_to_its_target() -> None:
    service = Service(num_pipelines=2)
    service.tell(PipelineLoad(0, 0.0, kv_share=1.9, num_waiting=0, num_running=9), 5)
    assert service.changes == [(2.0, 3)]


@pytest.mark.parametrize(("num_waiting", "expected"), [(0, 1), (1, 2), (5, 2)])
def test_what_fills_a_pipeline_alone_would_not_be_spread(num_waiting: int, expected: int) -> None:
    service = Service()
    service.tell(PipelineLoad(0, 0.0, kv_share=1.0, num_waiting=num_waiting, num_running=1), 5)
    assert service.num_pipelines == expected
    service = Service()
    policy, lone = service.policy, PipelineLoad(0, 0.0, kv_share=1.0, num_waiting=0, num_running=1)
    assert [policy.decide(float(now_s), [lone], 1, 1) for now_s in range(3)] == [1, 1, 2]


def test_the_larger_need_counts() -> None:
    service = Service(num_pipelines=2)
    service.tell(PipelineLoad(3500, 100.0, kv_share=1.9, num_waiting=10, num_running=9), 5)
    assert service.changes == [(2.0, 4)]


def test_what_runs_already_needs_no_more_pipelines_than_it_runs_on() -> None:
    """A long request may take minutes, and no second pipeline would make it faster."""
    service = Service()
    service.tell(PipelineLoad(90_000, 100.0, 0.3, num_waiting=0, num_running=1), 100)
    assert service.changes == []


def test_each_that_waits_justifies_one_more_at_most() -> None:
    service = Service()
    service.tell(PipelineLoad(90_000, 100.0, 0.3, num_waiting=2, num_running=1), 3)
    assert service.changes == [(2.0, 3)]


def test_requests_that_no_pipeline_has_taken_wait_too() -> None:
    service = Service()
    service.tell(PipelineLoad(90_000, 100.0, 0.3, num_waiting=0, num_running=1), 3, num_without_pipeline=2)
    assert service.changes == [(2.0, 3)]


def test_without_a_known_speed_a_backlog_says_nothing() -> None:
    service = Service()
    service.tell(backlog(9000)._replace(tokens_per_s=0.0), 10)
    assert service.changes == []


def test_a_speed_is_remembered_and_those_that_are_known_stand_for_the_others() -> None:
    service = Service()
    service.tell(backlog(500))
    service.tell(backlog(3500)._replace(tokens_per_s=0.0), 5)
    assert service.changes == [(3.0, 4)]
    policy = ScalingPolicy(LIMITS)
    loads = [backlog(1000), backlog(1000)._replace(tokens_per_s=0.0), backlog(3000)._replace(tokens_per_s=300.0)]
    assert [policy.decide(now_s, loads, 1, 0) for now_s in (0.0, 1.0, 2.0)] == [1, 1, 3]  # 5000 at 200 per second


def test_it_goes_down_after_a_whole_low_delay_to_what_was_enough_all_the_time() -> None:
    service = Service(num_pipelines=6)
    service.tell(backlog(600), 30)
    service.tell(backlog(1300), 10)  # two are enough
    service.tell(backlog(600), 40)
    assert service.changes == [(60.0, 2)]
    service.tell(backlog(600), 60)
    assert service.changes[1:] == [(121.0, 1)]


def test_a_need_for_what_there_is_starts_the_low_delay_anew() -> None:
    service = Service(num_pipelines=3)
    service.tell(backlog(600), 59)
    service.tell(backlog(2500), 1)
    service.tell(backlog(600), 60)
    assert service.changes == []
    service.tell(backlog(600), 1)
    assert service.changes == [(120.0, 1)]


@pytest.mark.parametrize("num_tokens", [1000 * DOWN_SHARE + 2, 1000])
def test_a_load_between_the_targets_keeps_the_number_as_it_is(num_tokens: float) -> None:
    for num_pipelines in (1, 2):
        service = Service(num_pipelines=num_pipelines)
        service.tell(backlog(int(num_tokens)), 1000)
        assert service.changes == []


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), level=st.integers(500, 6000))
def test_noise_does_not_make_it_flap(seed: int, level: int) -> None:
    """Half an hour of a load that jumps by up to 15 % either way each second: it goes one way only."""
    noise = random.Random(seed)
    service = Service(num_pipelines=4)
    for _ in range(1800):
        service.tell(backlog(int(level * noise.uniform(0.85, 1.15))))
    numbers = [4, *(number for _, number in service.changes)]
    assert numbers in (sorted(numbers), sorted(numbers, reverse=True))


def test_bursts_closer_than_the_low_delay_keep_it_up() -> None:
    service = Service()
    for _ in range(20):
        service.tell(backlog(4500), 5)
        service.tell(backlog(100), 50)
    assert service.changes == [(2.0, 5)]


def test_without_requests_it_goes_to_zero_where_that_is_allowed() -> None:
    service = Service(LIMITS._replace(min_pipelines=0), num_pipelines=3)
    service.tell(IDLE, 400)
    assert service.changes == [(60.0, 1), (300.0, 0)]
    service = Service(num_pipelines=3)
    service.tell(IDLE, 400)
    assert service.changes == [(60.0, 1)]


def test_only_the_last_one_is_stopped_for_want_of_requests() -> None:
    """However short the time for that is: the others go by their own."""
    service = Service(LIMITS._replace(min_pipelines=0, scale_to_zero_delay_s=10.0), num_pipelines=8)
    service.tell(IDLE, 60)
    assert service.changes == []
    service.tell(IDLE, 10)
    assert service.changes == [(60.0, 1), (61.0, 0)]


def test_the_idle_time_before_it_slept_is_forgotten() -> None:
    """What is told when it wakes may still be the load of the pipeline that was stopped."""
    policy = ScalingPolicy(LIMITS._replace(min_pipelines=0))
    decisions = [policy.decide(float(now_s), [IDLE], 1, 0) for now_s in range(301)]
    assert decisions == [1] * 300 + [0]
    assert policy.decide(301.0, [IDLE], 0, 1) == 1
    decisions = [policy.decide(302.0 + now_s, [IDLE], 1, 0) for now_s in range(301)]
    assert decisions == [1] * 300 + [0]


def test_a_need_that_could_not_be_met_is_met_as_soon_as_it_can() -> None:
    policy = ScalingPolicy(LIMITS)
    decisions = [policy.decide(float(now_s), [backlog(4500)], 1, 0) for now_s in range(6)]
    assert decisions == [1, 1, 5, 5, 5, 5], "the number stays 1: there is no room"
    assert policy.decide(6.0, [backlog(9000)], 5, 0) == 5, "more than five were not needed for long enough yet"


@pytest.mark.parametrize(
    ("load", "num_without_pipeline"),
    [
        (IDLE._replace(num_tokens_waiting=1), 0),
        (IDLE._replace(num_waiting=1), 0),
        (IDLE._replace(kv_share=0.01), 0),
        (IDLE, 1),
    ],
)
def test_any_request_starts_the_idle_time_anew(load: PipelineLoad, num_without_pipeline: int) -> None:
    service = Service(LIMITS._replace(min_pipelines=0))
    service.tell(IDLE, 299)
    service.tell(load, 1, num_without_pipeline)
    service.tell(IDLE, 300)
    assert service.changes == []
    service.tell(IDLE, 1)
    assert service.changes == [(600.0, 0)]


def test_the_first_waiting_request_brings_one_back_at_once() -> None:
    service = Service(LIMITS._replace(min_pipelines=0), num_pipelines=0)
    service.tell(IDLE, 1000)
    assert service.changes == []
    service.tell(IDLE, 1, num_without_pipeline=1)
    assert service.changes == [(1000.0, 1)]


def test_as_long_as_none_runs_the_number_stays() -> None:
    """It starts, which may take long; and what it will have to do is not known yet."""
    policy = ScalingPolicy(LIMITS._replace(min_pipelines=0))
    assert {policy.decide(float(now_s), [], 2, 30) for now_s in range(1000)} == {2}
    assert {policy.decide(float(now_s), [], 2, 0) for now_s in range(1000, 2000)} == {2}


def test_the_idle_time_begins_when_it_runs() -> None:
    policy = ScalingPolicy(LIMITS._replace(min_pipelines=0))
    decisions = [policy.decide(float(now_s), [] if now_s < 500 else [IDLE], 1, 0) for now_s in range(801)]
    assert decisions == [1] * 800 + [0]


@pytest.mark.parametrize(("num_target", "expected"), [(0, 2), (1, 2), (9, 8)])
def test_a_number_out_of_bounds_is_brought_in_at_once(num_target: int, expected: int) -> None:
    policy = ScalingPolicy(LIMITS._replace(min_pipelines=2))
    assert policy.decide(0.0, [], num_target, 0) == expected


LOADS = st.builds(
    PipelineLoad,
    st.integers(0, 10**9),
    st.sampled_from([0.0, 1e-3, 100.0, 1e6]),
    st.floats(0, 1),
    st.integers(0, 10**6),
    st.integers(0, 1000),
)


@given(
    st.lists(st.tuples(st.floats(0, 200), st.lists(LOADS, max_size=5), st.integers(0, 50)), max_size=30),
    st.integers(0, 3),
    st.integers(3, 9),
)
def test_it_stays_within_its_bounds(
    steps: list[tuple[float, list[PipelineLoad], int]], min_pipelines: int, max_pipelines: int
) -> None:
    policy = ScalingPolicy(LIMITS._replace(min_pipelines=min_pipelines, max_pipelines=max_pipelines))
    now_s, num_target = 0.0, min_pipelines
    for elapsed_s, loads, num_without_pipeline in steps:
        now_s += elapsed_s
        before, num_target = num_target, policy.decide(now_s, loads, num_target, num_without_pipeline)
        assert min_pipelines <= num_target <= max_pipelines
        if num_target == 0 and before > 0:
            assert num_without_pipeline == 0
