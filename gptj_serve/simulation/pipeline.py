"""`SimulatedPipeline`: an engine and its stages over simulated time."""

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from gptj_serve.simulation.step_shape import StepShape
from gptj_serve.simulation.steps_source import StepsSource
from gptj_serve.types import EngineRequest


class StepCosts(Protocol):
    """How long a microbatch takes, in seconds."""

    def stage_times_s(self, shape: StepShape) -> list[float]:
        """On each stage, in their order."""

    def handoff_time_s(self, shape: StepShape) -> float:
        """From one stage to the next."""

    def engine_time_s(self, shape: StepShape) -> float:
        """Of the engine, which does one thing at a time, when the microbatch is back."""


Clock = Callable[[], float]
S = TypeVar("S", bound=StepsSource)

OnSpan = Callable[[int, int, StepShape, float, float], None]
"""Microbatch, stage, shape, start and end of a stage's work."""


class SimulatedPipeline(Generic[S]):
    """As `Engine`: up to as many microbatches in flight as there are stages, which run them in their order."""

    def __init__(
        self, make_source: Callable[[Clock], S], costs: StepCosts, num_stages: int, on_span: OnSpan | None = None
    ) -> None:
        """`make_source` is given the clock of this pipeline."""
        self.now = 0.0
        self.source: S = make_source(lambda: self.now)
        self._costs = costs
        self._on_span = on_span
        self._num_stages = num_stages
        self._free_s = [0.0] * num_stages
        self._engine_free_s = 0.0
        self._in_flight: deque[tuple[float, float]] = deque()  # when it is back, and the engine's time for it
        self._num_microbatches = 0
        self._has_new = False  # requests that nothing was scheduled for since they came

    @property
    def next_event_s(self) -> float | None:
        """When the engine is done with what comes back next."""
        if not self._in_flight:
            return None
        back_s, engine_s = self._in_flight[0]
        return max(back_s, self._engine_free_s) + engine_s

    def advance(self, until: float) -> None:
        """Do all that happens up to that time."""
        if self._has_new and until > self.now:
            self._fill()
        in_flight = self._in_flight
        while in_flight:
            back_s, engine_s = in_flight[0]
            done_s = (back_s if back_s > self._engine_free_s else self._engine_free_s) + engine_s
            if done_s > until:
                break
            in_flight.popleft()
            self.now = self._engine_free_s = done_s
            shape = self.source.repeat()
            if shape is not None:
                self._start(shape)
            else:
                self.source.complete()
                self._fill()
        if until > self.now:
            self.now = until

    def add(self, request: EngineRequest) -> None:
        """A request arrives now; it is scheduled with all that do. Raises what `Scheduler.add` does."""
        self.source.add(request)
        self._has_new = True

    def finish(self) -> None:
        """Go on until all is done; `now` is then when it was."""
        self._fill()
        while (next_s := self.next_event_s) is not None:
            self.advance(next_s)

    def _fill(self) -> None:
        self._has_new = False
        source = self.source
        while len(self._in_flight) < self._num_stages:
            shape = source.next_step()
            refused = source.refuse_late()
            if shape is not None:
                self._start(shape)
            elif not refused:
                return

    def _start(self, shape: StepShape) -> None:
        """Through all stages, each as soon as it and its input are there."""
        free_s, at = self._free_s, self.now
        handoff_s = self._costs.handoff_time_s(shape) if self._num_stages > 1 else 0.0
        for index, time_s in enumerate(self._costs.stage_times_s(shape)):
            if index:
                at += handoff_s
            if free_s[index] > at:
                at = free_s[index]
            if self._on_span is not None:
                self._on_span(self._num_microbatches, index, shape, at, at + time_s)
            at += time_s
            free_s[index] = at
        self._num_microbatches += 1
        self._in_flight.append((at, self._costs.engine_time_s(shape)))
