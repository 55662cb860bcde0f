"""What has room beside what it replaces."""

import math

import pytest

from gptj_serve.serving.capacity import Group, num_that_fit, surge_percent, surges

PIPELINE = [{"CPU": 0.1}, {"GPU": 1.0, "CPU": 1.0}, {"GPU": 1.0, "CPU": 1.0}]


@pytest.mark.parametrize(
    ("strategy", "nodes", "num"),
    [
        ("PACK", [{"CPU": 8.0, "GPU": 4.0}], 2),
        ("PACK", [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}], 1),
        ("PACK", [{"CPU": 8.0}], 0),
        ("PACK", [{"CPU": 2.05, "GPU": 2.0}], 0),
        ("PACK", [{"CPU": 0.7 + 0.7 + 0.7, "GPU": 2.0}], 1),  # 2.0999999999999996
        ("STRICT_PACK", [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}], 0),
        ("STRICT_PACK", [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 3.0}], 1),
        ("STRICT_SPREAD", [{"CPU": 8.0, "GPU": 4.0}], 0),
        ("STRICT_SPREAD", [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 1.0}], 3),
    ],
)
def test_how_many_fit(strategy: str, nodes: list[dict[str, float]], num: int) -> None:
    assert num_that_fit(PIPELINE, strategy, nodes, 3) == num
    assert num_that_fit(PIPELINE, strategy, nodes, 1) == min(num, 1)


@pytest.mark.parametrize(
    ("num_surging", "num_replicas", "percent"),
    [(1, 1, 100), (0, 1, 0), (1, 2, 50), (1, 3, 33), (3, 3, 100), (1, 200, 1)],
)
def test_percent(num_surging: int, num_replicas: int, percent: int) -> None:
    """Serve rounds up to whole replicas."""
    assert surge_percent(num_surging, num_replicas) == percent
    assert math.ceil(num_replicas * percent / 100) >= num_surging


@pytest.mark.parametrize(
    ("num_fitting", "num_replicas", "num_running", "num_surging"),
    [(1, 1, 1, 1), (0, 1, 1, 0), (1, 2, 1, 0), (2, 2, 1, 1), (1, 2, 2, 1), (1, 3, 3, 1), (9, 3, 3, 3)],
)
def test_surge(num_fitting: int, num_replicas: int, num_running: int, num_surging: int) -> None:
    """With what more replicas need on top, it never exceeds the room."""
    pipeline = Group([{"GPU": 1.0}], num_replicas, num_running)
    assert surges(Group([], 1, 1), pipeline, "PACK", [{"GPU": float(num_fitting)}]) == (1, num_surging)


SMALL = [{"CPU": 0.1}, {"CPU": 0.5}, {"CPU": 0.5}]


@pytest.mark.parametrize(
    ("nodes", "num_ingresses", "num_pipelines", "num_surging"),
    [
        ([{"CPU": 1.3}], 2, 1, (1, 1)),  # of both ingresses, the pipeline would have no room
        ([{"CPU": 1.5}], 2, 1, (2, 1)),
        ([{"CPU": 1.2}], 2, 1, (2, 0)),  # there is none for it anyway
        ([{"CPU": 0.3}], 2, 1, (1, 0)),
        ([{"CPU": 0.1}], 2, 1, (0, 0)),
        ([{"CPU": 2.6}], 2, 2, (2, 2)),
        ([{"CPU": 2.5}], 2, 2, (2, 1)),
        ([{"CPU": 9.0}], 0, 2, (1, 2)),  # the first deploy of ingresses
        ([{"CPU": 1.2}, {"CPU": 0.2}], 1, 1, (1, 0)),  # an ingress may land on either node
        ([{"CPU": 1.3}, {"CPU": 0.1}], 1, 1, (1, 1)),
    ],
)
def test_what_surges_together_has_room_together(
    nodes: list[dict[str, float]], num_ingresses: int, num_pipelines: int, num_surging: tuple[int, int]
) -> None:
    ingress = Group([{"CPU": 0.2}], max(num_ingresses, 1), num_ingresses)
    pipeline = Group(SMALL, num_pipelines, num_pipelines)
    assert surges(ingress, pipeline, "PACK", nodes) == num_surging


def test_ingresses_that_are_added_take_room_too() -> None:
    pipeline = Group(SMALL, 1, 1)
    assert surges(Group([{"CPU": 0.2}], 3, 1), pipeline, "PACK", [{"CPU": 1.6}]) == (3, 0)
    assert surges(Group([{"CPU": 0.2}], 3, 1), pipeline, "PACK", [{"CPU": 1.7}]) == (1, 1)


@pytest.mark.parametrize(("resources", "num_surging"), [({}, (1, 0)), ({"front": 1.0}, (1, 1))])
def test_an_ingress_takes_room_only_where_there_is_all_it_needs(
    resources: dict[str, float], num_surging: tuple[int, int]
) -> None:
    nodes = [{"CPU": 1.1}, {"CPU": 0.2, "front": 4.0}]
    assert surges(Group([{"CPU": 0.2, **resources}], 1, 1), Group(SMALL, 1, 1), "PACK", nodes) == num_surging


def test_an_ingress_without_cpus_is_where_there_are_none() -> None:
    nodes = [{"CPU": 1.1}, {"front": 1.0}]
    ingress = Group([{"CPU": 0.0, "front": 1.0}], 2, 2)
    assert surges(ingress, Group(SMALL, 1, 1), "PACK", nodes) == (1, 1)
