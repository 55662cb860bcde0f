"""Timelines in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open. Needs no torch.

The format is Google's ("Trace Event Format": https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU):
a process for each timeline; in it a track for the scheduler and one for each stage, on which every microbatch is a
slice; arrows from a microbatch's slice to its slice on the next stage; counters. Times are in microseconds, to the
nanosecond, from the first event.
"""

import gzip
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gptj_serve.engine.timeline import Occupancy, Span, Timeline
from gptj_serve.errors import ConfigError

TraceEvent = dict[str, Any]

MAX_TRACKS = 1000
"""Of a process: track ids are unique over all of them, and none is 0, which some readers take for an idle thread."""

_ORDER = {"M": 0, "X": 1, "i": 2, "C": 2, "s": 3, "f": 4}
_OPERATOR_ORDER = 5
"""Of events at the same time. Perfetto ties an arrow to the slice that began last before it in the file: so each end of
one follows its microbatch at once, and operators within come later."""


def trace_events(timelines: Mapping[str, Timeline]) -> list[TraceEvent]:
    """Of timelines with their names: metadata first, then all else in the order of time."""
    events: list[TraceEvent] = []
    origin_s = min((at_s for timeline in timelines.values() for at_s in _beginnings(timeline)), default=0.0)
    arrow_ids = itertools.count(1)
    for process_id, (name, timeline) in enumerate(timelines.items(), start=1):
        events += _Process(process_id, timeline, origin_s, arrow_ids).events(name)
    return sorted(events, key=_place)


def _place(event: TraceEvent) -> tuple[bool, float, int, float]:
    """Of two slices that begin together the longer one holds the other."""
    order = _OPERATOR_ORDER if event.get("cat") == "operator" else _ORDER[event["ph"]]
    return event["ph"] != "M", event["ts"], order, -event.get("dur", 0)


def check_trace_file(file: Path) -> None:
    """Raises `ConfigError` where no trace can be written, before work is done for it."""
    directory = file.absolute().parent
    if file.is_dir():
        raise ConfigError(f"{file}: is a directory; name a file for the trace")
    if not directory.is_dir():
        raise ConfigError(f"{file}: there is no directory {directory}")
    if not os.access(file if file.exists() else directory, os.W_OK):
        raise ConfigError(f"{file}: may not be written")


def write_trace(file: Path, timelines: Mapping[str, Timeline], about: Mapping[str, object]) -> None:
    """As JSON, compressed if the name ends in .gz; `about` says what it is of. Raises `ConfigError`."""
    check_trace_file(file)
    events = ",\n".join(json.dumps(event, separators=(",", ":")) for event in trace_events(timelines))
    rest = json.dumps({"displayTimeUnit": "ms", "otherData": {key: str(value) for key, value in about.items()}})
    content = f'{{"traceEvents":[\n{events}\n],{rest[1:]}\n'.encode()
    try:
        file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    except OSError as error:
        raise ConfigError(f"{file}: the trace could not be written: {error.strerror}") from None


class _Process:
    def __init__(self, process_id: int, timeline: Timeline, origin_s: float, arrow_ids: Iterator[int]) -> None:
        assert timeline.num_stages < MAX_TRACKS
        self._id = process_id
        self._timeline = timeline
        self._origin_s = origin_s
        self._arrow_ids = arrow_ids
        self._scheduler_track = process_id * MAX_TRACKS

    def events(self, name: str) -> Iterable[TraceEvent]:
        timeline = self._timeline
        yield self._metadata("process_name", self._scheduler_track, name=name)
        if timeline.scheduler_spans or timeline.passages:
            yield self._metadata("thread_name", self._scheduler_track, name="scheduler")
            yield self._metadata("thread_sort_index", self._scheduler_track, sort_index=0)
        for stage_index in range(timeline.num_stages):
            yield self._metadata("thread_name", self._stage_track(stage_index), name=f"stage {stage_index}")
            yield self._metadata("thread_sort_index", self._stage_track(stage_index), sort_index=1 + stage_index)
        yield from self._scheduler()
        slices = [_without_overlaps(timeline.of_stage(index)) for index in range(timeline.num_stages)]
        for span, end_s in (pair for stage in slices for pair in stage):
            yield self._slice(
                f"microbatch {span.microbatch_id}", "stage", self._stage_track(span.stage_index),
                span.start_s, end_s, _figures(span),
            )  # fmt: skip
        for operator in timeline.operators:
            yield self._slice(
                operator.name, "operator", self._stage_track(operator.stage_index), operator.start_s, operator.end_s, {}
            )
        for senders, receivers in itertools.pairwise(slices):
            yield from self._arrows(senders, receivers)
        for occupancy in timeline.occupancies:
            for (counter, series), value in COUNTERS.items():
                event = self._event("C", counter, "scheduler", self._scheduler_track, occupancy.at_s)
                yield {**event, "args": {series: value(occupancy)}}

    def _scheduler(self) -> Iterable[TraceEvent]:
        for span in self._timeline.scheduler_spans:
            args = {} if span.microbatch_id is None else {"microbatch_id": span.microbatch_id}
            yield self._slice(span.name, "scheduler", self._scheduler_track, span.start_s, span.end_s, args)
        for passage in self._timeline.passages:
            event = self._event("i", passage.milestone.value, "request", self._scheduler_track, passage.at_s)
            yield {**event, "s": "t", "args": {"request_id": passage.request_id, "waited_s": passage.waited_s}}

    def _arrows(self, senders: list[tuple[Span, float]], receivers: list[tuple[Span, float]]) -> Iterable[TraceEvent]:
        """From each sender's slice to the receiver's; both ends are told with the slice's beginning, see `_ORDER`.

        By the clocks of two hosts a microbatch may have come before the sender began: then there is none.
        """
        sent = {span.microbatch_id: span for span, _ in senders}
        for receiver, _ in receivers:
            sender = sent.get(receiver.microbatch_id)
            if sender is None or receiver.start_s < sender.start_s:
                continue
            arrow_id = next(self._arrow_ids)
            for phase, span in (("s", sender), ("f", receiver)):
                track = self._stage_track(span.stage_index)
                event = {**self._event(phase, "handoff", "handoff", track, span.start_s), "id": arrow_id}
                yield event if phase == "s" else {**event, "bp": "e"}  # the slice around it, not the next one

    def _slice(
        self, name: str, category: str, track: int, start_s: float, end_s: float, args: Mapping[str, object]
    ) -> TraceEvent:
        event = self._event("X", name, category, track, start_s)
        duration_ns = self._nanoseconds(end_s) - self._nanoseconds(start_s)
        return {**event, "dur": max(0, duration_ns) / 1000, "args": dict(args)}

    def _metadata(self, kind: str, track: int, **args: object) -> TraceEvent:
        return {"ph": "M", "name": kind, "pid": self._id, "tid": track, "ts": 0, "args": args}

    def _event(self, phase: str, name: str, category: str, track: int, at_s: float) -> TraceEvent:
        at_us = self._nanoseconds(at_s) / 1000
        return {"ph": phase, "name": name, "cat": category, "pid": self._id, "tid": track, "ts": at_us}

    def _nanoseconds(self, at_s: float) -> int:
        return round((at_s - self._origin_s) * 1e9)

    def _stage_track(self, stage_index: int) -> int:
        return self._scheduler_track + 1 + stage_index


COUNTERS: dict[tuple[str, str], Callable[[Occupancy], int]] = {
    ("requests", "waiting"): lambda occupancy: occupancy.num_waiting,
    ("sequences", "running"): lambda occupancy: occupancy.num_running,
    ("KV blocks", "used"): lambda occupancy: occupancy.num_kv_blocks_used,
}
"""Names and what they count, which Perfetto shows as one name."""


def _figures(span: Span) -> dict[str, object]:
    """What is known of a step."""
    figures = {
        "num_rows": span.num_rows,
        "num_prompt_tokens": span.num_prompt_tokens,
        "num_decode_rows": span.num_decode_rows,
        "num_tokens": span.num_tokens,
        "handoff_us": None if span.handoff_s is None else round(span.handoff_s * 1e6, 3),
    }
    return {name: value for name, value in figures.items() if value is not None}


def _without_overlaps(spans: list[Span]) -> list[tuple[Span, float]]:
    """Each with its end: a stage does one thing at a time, but its clock may have been set back."""
    starts = [span.start_s for span in spans[1:]] + [float("inf")]
    return [(span, min(span.end_s, next_start_s)) for span, next_start_s in zip(spans, starts, strict=False)]


def _beginnings(timeline: Timeline) -> Iterable[float]:
    yield from (span.start_s for span in timeline.spans)
    yield from (span.start_s for span in timeline.scheduler_spans)
    yield from (operator.start_s for operator in timeline.operators)
    yield from (occupancy.at_s for occupancy in timeline.occupancies)
    yield from (passage.at_s for passage in timeline.passages)
