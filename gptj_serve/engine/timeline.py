"""When which stage works on which microbatch: as `gptj_serve.profiling` measures it, or `gptj_serve.simulation` finds
it for stages of given speed."""

import math
from dataclasses import dataclass, field
from typing import Literal

from gptj_serve.engine.milestones import Milestone


@dataclass(frozen=True, slots=True)
class Span:
    """A stage at work on a microbatch. None is what is not known of it."""

    microbatch_id: int
    stage_index: int
    start_s: float
    end_s: float
    num_rows: int | None = None
    num_tokens: int | None = None
    num_decode_rows: int | None = None
    num_prompt_tokens: int | None = None  # those that are computed again too
    handoff_s: float | None = None

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class SchedulerSpan:
    """The scheduler at work: "schedule" made the microbatch, or none if the id is None; "update" took its results."""

    name: Literal["schedule", "update"]
    microbatch_id: int | None
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator of torch, within a stage's step. One that calls others holds them in time."""

    name: str
    microbatch_id: int
    stage_index: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What the scheduler holds at a point in time."""

    at_s: float
    num_waiting: int
    num_running: int
    num_kv_blocks_used: int


@dataclass(frozen=True, slots=True)
class Passage:
    """A request reaches a milestone."""

    at_s: float
    milestone: Milestone
    request_id: str
    waited_s: float


@dataclass(slots=True)
class Timeline:
    """All in seconds from one origin, which is the start of a simulation, or Unix time where it was measured."""

    num_stages: int
    spans: list[Span] = field(default_factory=list)
    scheduler_spans: list[SchedulerSpan] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    occupancies: list[Occupancy] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)

    @property
    def duration_s(self) -> float:
        """From the first span's start to the last one's end."""
        if not self.spans:
            return 0.0
        return max(span.end_s for span in self.spans) - min(span.start_s for span in self.spans)

    @property
    def in_flight_s(self) -> float:
        """The time in which a microbatch was on its way: from when the scheduler had made it until it took its results.

        Where the scheduler's time is not known, from its first span's start to the last one's end.
        """
        begins: dict[int, float] = {}
        ends: dict[int, float] = {}
        for span in self.spans:
            begins[span.microbatch_id] = min(span.start_s, begins.get(span.microbatch_id, math.inf))
            ends[span.microbatch_id] = max(span.end_s, ends.get(span.microbatch_id, -math.inf))
        for made in self.scheduler_spans:
            if made.microbatch_id in begins:
                if made.name == "schedule":
                    begins[made.microbatch_id] = made.end_s
                else:
                    ends[made.microbatch_id] = made.start_s
        total_s, covered_until = 0.0, -math.inf
        for microbatch_id, start_s in sorted(begins.items(), key=lambda item: item[1]):
            end_s = ends[microbatch_id]
            total_s += max(0.0, end_s - max(start_s, covered_until))
            covered_until = max(covered_until, end_s)
        return total_s

    def of_stage(self, stage_index: int) -> list[Span]:
        """In the order of time."""
        spans = [span for span in self.spans if span.stage_index == stage_index]
        return sorted(spans, key=lambda span: span.start_s)

    @property
    def bubble_ratio(self) -> float:
        """The share of the stages' whole time, `duration_s` of each, in which they have nothing to do."""
        busy_s = sum(span.duration_s for span in self.spans)
        return 1 - busy_s / (self.num_stages * self.duration_s) if self.spans else 0.0

    def grid(self, slot_s: float, max_slots: int = 32) -> str:
        """A row per stage, a column per slot of time: the id of the microbatch at work at its beginning, or a dot."""
        width = len(str(max((span.microbatch_id for span in self.spans), default=0)))
        origin_s = min((span.start_s for span in self.spans), default=0.0)
        lines = []
        for stage_index in range(self.num_stages):
            cells = ["." * width] * min(max_slots, round(self.duration_s / slot_s))
            for span in self.spans:
                if span.stage_index == stage_index:
                    for slot in range(*(round((at_s - origin_s) / slot_s) for at_s in (span.start_s, span.end_s))):
                        if slot < len(cells):
                            cells[slot] = str(span.microbatch_id).rjust(width)
            lines.append(f"stage {stage_index} | {' '.join(cells)}")
        return "\n".join(lines)
