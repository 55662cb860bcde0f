"""How many pipelines start and stop, as Serve tells; no cluster."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from gptj_serve.serving import pipeline_counts
from gptj_serve.serving.pipeline_counts import PipelineCounts, PipelineStates, startup_problem


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, an answer is waited for."""
    monkeypatch.setattr(pipeline_counts, "TIMEOUT_S", 10.0)


def at_once(asked: Coroutine[Any, Any, Any]) -> Any:
    """What it returns, without any wait."""
    with pytest.raises(StopIteration) as end:
        asked.send(None)
    return end.value.value


async def test_serves_words_for_it() -> None:
    states: dict[str, int] = {}
    counts = PipelineCounts(lambda: PipelineStates(states))
    assert await counts.get() == {"num_starting": 0, "num_stopping": 0}
    states |= {"RUNNING": 5, "STARTING": 2, "STOPPING": 1}
    assert await counts.get() == {"num_starting": 2, "num_stopping": 1}
    assert await counts.problem() is None


async def test_why_none_starts() -> None:
    message = """The deployment failed to start 3 times in a row. This may be due to a problem with its constructor or
initial health check failing. See controller logs for details. Error:
Traceback (most recent call last):
  File "checkpoint.py", line 7, in open
FileNotFoundError: no such file: /models/gone/config.json
"""
    counts = PipelineCounts(lambda: PipelineStates({"STARTING": 1}, startup_problem(message)))
    answers = await asyncio.gather(counts.get(), counts.problem())
    assert answers == [
        {"num_starting": 1, "num_stopping": 0},
        "no pipeline starts: FileNotFoundError: no such file: /models/gone/config.json",
    ]
    assert startup_problem("") == "no pipeline starts: Serve does not say why"


async def test_a_serve_that_hangs_is_asked_once_and_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile what it told last counts, for a while."""
    hangs, goes_on, num_asked = False, threading.Event(), 0

    def states() -> PipelineStates:
        nonlocal num_asked
        num_asked += 1
        if hangs:
            goes_on.wait(10)
        return PipelineStates({"STARTING": num_asked}, "none starts")

    counts = PipelineCounts(states)
    first = {"num_starting": 1, "num_stopping": 0}
    assert await counts.get() == first
    hangs = True
    monkeypatch.setattr(pipeline_counts, "TIMEOUT_S", 0.05)
    assert await counts.get() == first
    assert [at_once(counts.get()), at_once(counts.problem()), num_asked] == [first, "none starts", 2]
    monkeypatch.setattr(pipeline_counts, "MAX_SILENCE_S", 0.0)
    assert at_once(counts.get()) is None
    monkeypatch.setattr(pipeline_counts, "TIMEOUT_S", 10.0)
    hangs = False
    goes_on.set()
    await counts.get()
    assert await counts.get() == {"num_starting": 3, "num_stopping": 0}


async def test_a_serve_that_fails_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def states() -> PipelineStates:
        raise KeyError("gptj")

    assert await PipelineCounts(states).get() is None
    assert [record.getMessage() for record in caplog.records] == [
        "Serve does not tell how many pipelines start and stop: KeyError('gptj')"
    ]
