"""`StepsSource`: what a simulated pipeline gets its steps from; `EveryRow`, the real scheduler, row by row."""

from collections import deque
from collections.abc import Callable
from typing import Protocol

from gptj_serve.engine.scheduler import Scheduler
from gptj_serve.simulation.outcomes import Outcomes
from gptj_serve.simulation.step_shape import StepShape, shape_of
from gptj_serve.steps import MicroBatch, RowResult, SampledToken, StepOutput
from gptj_serve.types import EngineRequest, Event, FailureEvent, TokenEvent

Answer = Callable[[MicroBatch], StepOutput]


class StepsSource(Protocol):
    """The scheduler of a simulated pipeline, and what becomes of its requests."""

    def add(self, request: EngineRequest) -> None:
        """Raises what `Scheduler.add` does."""

    def next_step(self) -> StepShape | None:
        """The next microbatch, which is in flight from now on; None if nothing can be scheduled."""

    def complete(self) -> None:
        """The oldest microbatch in flight is back."""

    def repeat(self) -> StepShape | None:
        """`complete` and then `next_step`, if there is a shorter way to both; else nothing is done."""

    def refuse_late(self) -> bool:
        """Note who has been given up since this was last called; whether there was anybody."""


class EveryRow:
    """All that a service does in its scheduler, for each row of each step. Slow, and what `SteadyRows` must equal."""

    def __init__(
        self, scheduler: Scheduler, on_events: Callable[[list[Event]], None], answer: Answer | None = None
    ) -> None:
        """`on_events` is called after each step, and with the failures of those who have waited too long."""
        self.scheduler = scheduler
        self._on_events = on_events
        self._answer = answer or any_answer
        self._in_flight: deque[MicroBatch] = deque()

    def add(self, request: EngineRequest) -> None:
        self.scheduler.add(request)

    def next_step(self) -> StepShape | None:
        microbatch = self.scheduler.schedule()
        if microbatch is None:
            return None
        self._in_flight.append(microbatch)
        return shape_of(microbatch.rows)

    def complete(self) -> None:
        self._on_events(self.scheduler.update(self._answer(self._in_flight.popleft())))

    def repeat(self) -> StepShape | None:
        return None

    def refuse_late(self) -> bool:
        failures = self.scheduler.take_failures()
        if failures:
            self._on_events(failures)
        return bool(failures)


def note_events(outcomes: Outcomes, now: float, events: list[Event]) -> None:
    """Of requests whose ids are their indexes."""
    for event in events:
        index = int(event.request_id)
        if isinstance(event, FailureEvent):
            outcomes.on_refused(index)
        elif isinstance(event, TokenEvent):
            outcomes.on_token(index, now)
            if event.finish_reason is not None:
                outcomes.on_end(index, event.index + 1)


def any_answer(microbatch: MicroBatch) -> StepOutput:
    token = RowResult(tokens=[SampledToken(1, -1.0)])
    return StepOutput(microbatch.microbatch_id, [token if row.samples else None for row in microbatch.rows])
