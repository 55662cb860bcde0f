"""`simulate_schedule`: a scheduler's steps over stages of given speed, as a timeline to look at."""

from collections.abc import Callable, Iterable

from gptj_serve.engine.scheduler import Scheduler
from gptj_serve.engine.timeline import Span, Timeline
from gptj_serve.simulation.pipeline import SimulatedPipeline
from gptj_serve.simulation.step_shape import StepShape
from gptj_serve.simulation.steps_source import Answer, EveryRow
from gptj_serve.types import EngineRequest, Event


def simulate_schedule(
    scheduler: Scheduler,
    arrivals: Iterable[tuple[float, EngineRequest]],
    stage_time_s: Callable[[StepShape, int], float],
    answer: Answer | None = None,
    on_events: Callable[[float, list[Event]], None] = lambda now_s, events: None,
    num_stages: int | None = None,
) -> Timeline:
    """Serve requests that arrive at given times, in order; handing on takes no time, and the engine none.

    There are as many stages as the scheduler counts on, or `num_stages`. Without an `answer` every token is the same.
    """
    num_stages = num_stages or scheduler.limits.num_stages
    timeline = Timeline(num_stages)

    def note(microbatch_id: int, stage_index: int, shape: StepShape, start_s: float, end_s: float) -> None:
        timeline.spans.append(Span(microbatch_id, stage_index, start_s, end_s, shape.num_rows, shape.num_tokens))

    pipeline = SimulatedPipeline(
        lambda clock: EveryRow(scheduler, lambda events: on_events(clock(), events), answer),
        _StageTimes(num_stages, stage_time_s),
        num_stages,
        note,
    )
    for arrival_s, request in arrivals:
        pipeline.advance(arrival_s)
        pipeline.add(request)
    pipeline.finish()
    return timeline


class _StageTimes:
    def __init__(self, num_stages: int, stage_time_s: Callable[[StepShape, int], float]) -> None:
        self._num_stages = num_stages
        self._stage_time_s = stage_time_s

    def stage_times_s(self, shape: StepShape) -> list[float]:
        return [self._stage_time_s(shape, index) for index in range(self._num_stages)]

    def handoff_time_s(self, shape: StepShape) -> float:
        return 0.0

    def engine_time_s(self, shape: StepShape) -> float:
        return 0.0
