"""`PipelineCounts`: how many pipelines Serve is starting and stopping, for whoever looks at the status."""

import asyncio
import logging
from collections.abc import Callable, Mapping

from ray import serve

from gptj_serve.api.status import PipelineChanges

logger = logging.getLogger(__name__)

TIMEOUT_S = 2.0


class PipelineCounts:
    def __init__(self, states: Callable[[], Mapping[str, int]]) -> None:
        """`states` gives how many replicas are in which of Serve's states; it may block, and is called in a thread."""
        self._states = states
        self._asking: asyncio.Task[Mapping[str, int]] | None = None

    async def get(self) -> PipelineChanges | None:
        """None where Serve does not answer soon. It is not asked again before it has: threads are few."""
        if self._asking is None:
            self._asking = asyncio.create_task(asyncio.to_thread(self._states))
        done, _ = await asyncio.wait({self._asking}, timeout=TIMEOUT_S)
        if not done:
            return None
        asked, self._asking = self._asking, None
        if (error := asked.exception()) is not None:
            logger.warning("Serve does not tell how many pipelines start and stop: %r", error)
            return None
        states = asked.result()
        return {"num_starting": states.get("STARTING", 0), "num_stopping": states.get("STOPPING", 0)}


def own_states() -> Mapping[str, int]:
    """Of the pipelines of the application that this replica belongs to."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    return dict(application.deployments["Pipeline"].replica_states)
