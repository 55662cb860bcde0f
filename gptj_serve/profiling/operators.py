"""Operators of torch, as its profiler sees them, put into the stages' steps."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch._C._autograd import DeviceType
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from gptj_serve.engine.timeline import Operator, Span
from gptj_serve.pipeline.stage_runner import StageRunner
from gptj_serve.steps import MicroBatch, StepOutput

STEP_PREFIX = "gptj_serve step "


class ProfiledRunner(StageRunner):
    """Its steps have names for torch's profiler, and end when the device has done them, so that they can be timed."""

    def run(self, microbatch: MicroBatch, hidden: Tensor | None) -> Tensor | StepOutput:
        with record_function(f"{STEP_PREFIX}{self.spec.span.start} {microbatch.microbatch_id}"):
            result = super().run(microbatch, hidden)
            self.synchronize()
        return result


def operator_profiler() -> profile:
    """Of all threads: each stage has one of its own. Not of kernels on a GPU, which belong to no stage's thread."""
    return profile(activities=[ProfilerActivity.CPU], experimental_config=_ExperimentalConfig(profile_all_threads=True))


def operators_in(events: Iterable[Any], spans: Sequence[Span], layers: Sequence[range]) -> list[Operator]:
    """Of the profiler's `FunctionEvent`s those in the stages' `spans`, in these spans' time.

    The profiler has a clock of its own. How far it is from the spans' is known from the steps, since the profiler's
    record of a step lies within its span.
    """
    stage_of_layer = {span.start: index for index, span in enumerate(layers)}
    span_of = {(span.stage_index, span.microbatch_id): span for span in spans}
    steps: list[tuple[Any, Span]] = []
    others: dict[int, list[Any]] = {}  # by thread
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        if not event.name.startswith(STEP_PREFIX):
            others.setdefault(event.thread, []).append(event)
            continue
        first_layer, microbatch_id = map(int, event.name.removeprefix(STEP_PREFIX).split())
        if (span := span_of.get((stage_of_layer[first_layer], microbatch_id))) is not None:
            steps.append((event, span))
    offset_s = max((span.start_s - event.time_range.start / 1e6 for event, span in steps), default=0.0)
    operators = []
    for events_of_thread in others.values():
        events_of_thread.sort(key=_start)
    for step, span in steps:
        candidates = others.get(step.thread, [])
        first, end = (bisect_left(candidates, at, key=_start) for at in (step.time_range.start, step.time_range.end))
        for event in candidates[first:end]:
            start_s, end_s = (
                min(max(at_us / 1e6 + offset_s, span.start_s), span.end_s)
                for at_us in (event.time_range.start, event.time_range.end)
            )
            operators.append(Operator(event.name, span.microbatch_id, span.stage_index, start_s, end_s))
    return operators


def _start(event: Any) -> float:
    """In microseconds."""
    return float(event.time_range.start)
