"""Whether one more pipeline has room."""

import pytest

from gptj_serve.serving.capacity import num_that_fit, surge_percent

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
    ("num_fitting", "num_replicas", "num_running", "percent"),
    [
        (1, 1, 1, 100),
        (0, 1, 1, 0),
        (1, 2, 1, 0),
        (2, 2, 1, 50),
        (1, 2, 2, 50),
        (1, 3, 3, 33),
        (9, 3, 3, 100),
        (1, 200, 200, 1),
    ],
)
def test_surge(num_fitting: int, num_replicas: int, num_running: int, percent: int) -> None:
    """With what more replicas need on top, it never exceeds the room."""
    assert surge_percent(num_fitting, num_replicas, num_running) == percent
