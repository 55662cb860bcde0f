"""A profile in figures."""

from dataclasses import dataclass

from gptj_serve.engine.timeline import Timeline
from gptj_serve.profiling.percentile import percentile


@dataclass(frozen=True, slots=True)
class StageSummary:
    """Of one stage. `busy_ratio` is of the profile's whole time; `bubble_ratio` is the share of the time with a
    microbatch on its way, from scheduler to scheduler, in which this stage had none."""

    stage_index: int
    layers: tuple[int, int]  # half-open
    num_steps: int
    mean_step_s: float
    p50_step_s: float
    p99_step_s: float
    busy_ratio: float
    bubble_ratio: float
    mean_handoff_s: float | None  # None of the first stage, which receives from none


@dataclass(frozen=True, slots=True)
class ProfileSummary:
    dtype: str
    kernels: str  # of the stages, as in a service's status
    threads_per_stage: int
    num_finished: int
    num_refused: int  # requests that would have waited too long
    num_steps: int
    duration_s: float  # from the first step's start to the last one's end
    num_prompt_tokens: int  # of the requests that were finished
    num_tokens_generated: int
    num_preemptions: int
    tokens_per_s: float  # generated
    scheduler_s_per_step: float
    stages: list[StageSummary]


def summarize_stage(timeline: Timeline, stage_index: int, layers: range) -> StageSummary:
    spans = timeline.of_stage(stage_index)
    durations_s = [span.duration_s for span in spans]
    handoffs_s = [span.handoff_s for span in spans if span.handoff_s is not None]
    busy_s = sum(durations_s)
    return StageSummary(
        stage_index,
        (layers.start, layers.stop),
        len(spans),
        _ratio(busy_s, len(spans)),
        percentile(durations_s, 0.5, of_nothing=0.0),
        percentile(durations_s, 0.99, of_nothing=0.0),
        _ratio(busy_s, timeline.duration_s),
        1 - _ratio(busy_s, timeline.in_flight_s) if spans else 0.0,
        sum(handoffs_s) / len(handoffs_s) if handoffs_s else None,
    )


def scheduler_s_per_step(timeline: Timeline) -> float:
    """Of all that it did, also where it found nothing to schedule."""
    steps = {span.microbatch_id for span in timeline.spans}
    return _ratio(sum(span.end_s - span.start_s for span in timeline.scheduler_spans), len(steps))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
