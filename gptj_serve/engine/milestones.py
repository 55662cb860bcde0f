"""What happens to a request in the scheduler, for whoever measures or traces it."""

from collections.abc import Callable
from enum import StrEnum

from gptj_serve.types import EngineRequest


class Milestone(StrEnum):
    QUEUED = "queued"
    SCHEDULED = "scheduled"  # for the first time
    PREEMPTED = "preempted"
    RESUMED = "resumed"  # scheduled again


OnMilestone = Callable[[Milestone, EngineRequest, float], None]
"""Called in the engine's loop, so it must be quick; the number is the seconds for which a SCHEDULED or RESUMED request
had to wait, and 0 of the others."""


def ignore(milestone: Milestone, request: EngineRequest, elapsed_s: float) -> None:
    """Nobody wants to know."""
