"""How many pipelines start and stop, as Serve tells; no cluster."""

import asyncio
import threading
from collections.abc import Mapping

import pytest

from gptj_serve.serving import pipeline_counts
from gptj_serve.serving.pipeline_counts import PipelineCounts


async def test_serves_words_for_it() -> None:
    states: dict[str, int] = {}
    counts = PipelineCounts(lambda: states)
    assert await counts.get() == {"num_starting": 0, "num_stopping": 0}
    states |= {"RUNNING": 5, "STARTING": 2, "STOPPING": 1}
    assert await counts.get() == {"num_starting": 2, "num_stopping": 1}


async def test_a_serve_that_hangs_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_counts, "TIMEOUT_S", 0.05)
    answers, num_asked = threading.Event(), 0

    def states() -> Mapping[str, int]:
        nonlocal num_asked
        num_asked += 1
        answers.wait(10)
        return {"STARTING": num_asked}

    counts = PipelineCounts(states)
    assert [await counts.get() for _ in range(3)] == [None] * 3
    assert num_asked == 1
    answers.set()
    await asyncio.sleep(0.01)
    assert await counts.get() == {"num_starting": 1, "num_stopping": 0}


async def test_a_serve_that_fails_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def states() -> Mapping[str, int]:
        raise KeyError("gptj")

    assert await PipelineCounts(states).get() is None
    assert [record.getMessage() for record in caplog.records] == [
        "Serve does not tell how many pipelines start and stop: KeyError('gptj')"
    ]
