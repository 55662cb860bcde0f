"""Whether one more pipeline has room."""

import pytest

from gptj_serve.serving.capacity import num_that_fit

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
