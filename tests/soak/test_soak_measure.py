"""A soak finds what grows, and does not take noise for growth."""

import random

import pytest

from tests.chaos.faults import Resources
from tests.soak.measure import ClusterState, Samples, cluster_differences, differences, fit

MIB = 2**20


def test_a_slope_is_found_in_noise() -> None:
    rng = random.Random(0)
    times = [5.0 * n for n in range(720)]  # an hour
    leaking = fit(times, [int((300 + 60 * at / 3600 + rng.uniform(-3, 3)) * MIB) for at in times])
    assert leaking.slope_mib_per_h == pytest.approx(60, abs=1)
    assert leaking.growth_mib == pytest.approx(60, abs=1)
    assert leaking.is_leak
    steady = fit(times, [int((300 + rng.uniform(-30, 30)) * MIB) for at in times])
    assert abs(steady.slope_mib_per_h) < 4 * steady.standard_error
    assert not steady.is_leak


def test_a_short_soak_is_not_sure() -> None:
    rng = random.Random(0)
    times = [5.0 * n for n in range(12)]  # a minute
    assert not fit(times, [int((300 + rng.uniform(-3, 3)) * MIB) for _ in times]).is_leak
    assert not fit([0.0], [MIB]).is_leak


def test_the_second_half_of_each_process_is_looked_at() -> None:
    samples = Samples()
    for n in range(8):
        of_stage = Resources(1, 9, 9, 9, (100 + n) * MIB)
        of_proxy = Resources(1, 9, 9, 9, min(50 + 10 * n, 90) * MIB)  # its caches fill, and that is it
        samples.add(n * 900.0, {"STAGE 1": of_stage, "PROXY 2": of_proxy})
    slopes = [(name, round(one.slope_mib_per_h, 6)) for name, one in samples.fits().items()]
    assert slopes == [("PROXY 2", 0), ("STAGE 1", 4)]
    assert samples.memory_mib(every=3) == {"PROXY 2": [50, 80, 90], "STAGE 1": [100, 103, 106]}


def test_what_is_held_at_rest_is_told_by_process() -> None:
    before = {"STAGE 1": Resources(1, 100, 40, 60, MIB), "PROXY 2": Resources(1, 50, 20, 30, MIB)}
    assert differences(before, before) == []
    after = {"STAGE 1": Resources(1, 120, 45, 60, 9 * MIB), "PROXY 3": Resources(1, 50, 20, 30, MIB)}
    assert differences(before, after) == ["PROXY 2 has ended", "PROXY 3 is new", "STAGE 1: num_files 100 → 120"]


def test_what_a_cluster_holds_more_is_told() -> None:
    before = ClusterState(9, 2, {"Ingress a main": 20})
    assert cluster_differences(before, ClusterState(9, 2, {"Ingress a main": 22})) == []
    assert cluster_differences(before, ClusterState(10, 3, {"Ingress a main": 40})) == [
        "num_actors 9 → 10", "num_placement_groups 2 → 3", "Ingress a main: asyncio tasks 20 → 40",
    ]  # fmt: skip
