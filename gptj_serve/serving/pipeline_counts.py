"""`PipelineCounts`: what Serve tells of the pipelines that start and stop, for whoever looks at the status."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ray import serve

from gptj_serve.api.status import PipelineChanges

logger = logging.getLogger(__name__)

TIMEOUT_S = 0.1
"""Nobody waits for longer, probes least of all: what was told last does."""

MAX_SILENCE_S = 10.0
"""What was told last says nothing any more once Serve has not answered for so long."""

_STARTUP_FAILED = "REPLICA_STARTUP_FAILED"


class PipelineStates(NamedTuple):
    num_replicas: Mapping[str, int]  # by Serve's state
    problem: str | None = None  # why none starts; None while they do, or may


class PipelineCounts:
    """Used in one event loop."""

    def __init__(self, states: Callable[[], PipelineStates]) -> None:
        """`states` may block, and is called in a thread."""
        self._states = states
        self._asking: asyncio.Task[PipelineStates] | None = None
        self._asked_at = 0.0
        self._told: PipelineStates | None = None

    async def get(self) -> PipelineChanges | None:
        """None where nothing is known. Serve is not asked again before it has answered: threads are few."""
        told = await self._newest()
        if told is None:
            return None
        numbers = told.num_replicas
        return {"num_starting": numbers.get("STARTING", 0), "num_stopping": numbers.get("STOPPING", 0)}

    async def problem(self) -> str | None:
        """Why no pipeline starts, if Serve has told that it gave up, or that it tries again and again."""
        told = await self._newest()
        return None if told is None else told.problem

    async def _newest(self) -> PipelineStates | None:
        clock = asyncio.get_running_loop().time
        if self._asking is None:
            self._asked_at = clock()
            self._asking = asyncio.create_task(asyncio.to_thread(self._states))
            self._asking.add_done_callback(self._on_answer)
        if (time_left_s := self._asked_at + TIMEOUT_S - clock()) > 0:
            await asyncio.wait({self._asking}, timeout=time_left_s)
        return self._told if self._asking is None or clock() - self._asked_at < MAX_SILENCE_S else None

    def _on_answer(self, asking: asyncio.Task[PipelineStates]) -> None:
        self._asking = self._told = None
        if asking.cancelled():
            return
        if (error := asking.exception()) is not None:
            logger.warning("Serve does not tell how many pipelines start and stop: %r", error)
        else:
            self._told = asking.result()


def own_states() -> PipelineStates:
    """Of the pipelines of the application that this replica belongs to."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    deployment = application.deployments["Pipeline"]
    has_failed = deployment.status_trigger == _STARTUP_FAILED
    return PipelineStates(dict(deployment.replica_states), startup_problem(deployment.message) if has_failed else None)


def startup_problem(message: str) -> str:
    """In one line; Serve's message ends with a traceback, whose last line is the error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"no pipeline starts: {lines[-1] if lines else 'Serve does not say why'}"
