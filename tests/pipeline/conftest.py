import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gptj_serve.pipeline.sockets import CurveKeys
from gptj_serve.pipeline.stage_runner import StageRunner
from tests.pipeline.linked import LinkedPipeline


@pytest.fixture(params=["ipc", "tcp"])
def linked(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., LinkedPipeline]:
    """Makes pipelines over ipc sockets, or over TCP with keys."""
    numbers = itertools.count()

    def make(runners: Sequence[StageRunner], step_timeout_s: float = 20.0) -> LinkedPipeline:
        if request.param == "ipc":
            where, new_keys = lambda name: f"ipc://{tmp_path}/{next(numbers)}-{name}", lambda: None
        else:
            where, new_keys = lambda _: "tcp://127.0.0.1", CurveKeys.generate
        return LinkedPipeline(runners, where, new_keys, step_timeout_s)

    return make


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> str:
    """Parametrize it, indirectly, with values of `StageSpec.kernels`; "auto" is skipped where we have none."""
    if request.param == "auto":
        request.getfixturevalue("cpu_kernels")
    return request.param
