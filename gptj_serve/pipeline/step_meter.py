"""`StepMeter`: what one stage has done lately, and since its start.

One thread of the stage's writes, others read. Points in time are Unix time, since they are compared between processes:
exact on one host, and between hosts as exact as their clocks; no span of time is ever negative.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptj_serve.steps import MicroBatch

NUM_STEPS_SHOWN = 64
WINDOW_S = 1.0
"""`busy_ratio` is of the time since so many seconds ago."""

MAX_TRACED_STEPS = 4096
"""Of those that nobody has taken yet, older ones are forgotten."""


@dataclass(frozen=True, slots=True)
class Step:
    microbatch_id: int
    started_at: float
    duration_s: float
    num_rows: int
    num_tokens: int
    handoff_s: float | None

    @property
    def ended_at(self) -> float:
        return self.started_at + self.duration_s


class TracedStep(NamedTuple):
    """A step with sequences that are traced."""

    step: Step
    traceparents: list[str]


class StepMeter:
    """For each step: `wait` when the stage is ready for it, `begin`, `end`."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._steps: deque[Step] = deque()  # the newest to be shown, and all of the last second
        self._ready_at = clock()
        self._started_at: float | None = None  # of the step at hand
        self._handoff_s: float | None = None
        self._num_steps = 0
        self._busy_s = 0.0
        self._num_handoffs = 0
        self._total_handoff_s = 0.0
        self._traced: deque[TracedStep] = deque(maxlen=MAX_TRACED_STEPS)

    def wait(self) -> None:
        """The stage has nothing to do but to wait for a microbatch."""
        self._ready_at = self._clock()
        self._started_at = None  # of a step that failed

    def begin(self, sent_at: float | None) -> None:
        """Computing begins, on hidden states that the stage before sent at `sent_at`; None on the first stage.

        Their handoff lasted from then, or from when this stage was ready for them, until now.
        """
        now = self._clock()
        self._handoff_s = None if sent_at is None else max(0.0, now - max(sent_at, self._ready_at))
        self._started_at = now

    def end(self, microbatch: MicroBatch) -> None:
        assert self._started_at is not None
        self._add(microbatch, self._started_at, self._handoff_s)

    def end_overlapped(self, microbatch: MicroBatch, given_at: float, sent_at: float | None) -> None:
        """A step has ended that a device was given at `given_at`, maybe while it still had another one: it began then,
        or when that one ended. Its handoff lasted until it was given to the device."""
        handoff_s = None if sent_at is None else max(0.0, given_at - sent_at)
        last_ended_at = self._steps[-1].ended_at if self._steps else given_at
        self._add(microbatch, max(given_at, last_ended_at), handoff_s)

    def _add(self, microbatch: MicroBatch, started_at: float, handoff_s: float | None) -> None:
        now = self._clock()
        step = Step(
            microbatch.microbatch_id,
            started_at,
            max(0.0, now - started_at),
            len(microbatch.rows),
            microbatch.num_tokens,
            handoff_s,
        )
        with self._lock:
            self._started_at = None
            self._steps.append(step)
            self._num_steps += 1
            self._busy_s += step.duration_s
            if step.handoff_s is not None:
                self._num_handoffs += 1
                self._total_handoff_s += step.handoff_s
            # Those from before the clock was set back seem to be yet to come: they go first of all.
            while len(self._steps) > NUM_STEPS_SHOWN and not now - WINDOW_S <= self._steps[0].ended_at <= now:
                self._steps.popleft()
            if microbatch.traceparents:
                self._traced.append(TracedStep(step, microbatch.traceparents))

    def status(self) -> dict[str, Any]:
        """The measured fields of `api.status.StageStatus`."""
        with self._lock:
            now, started_at, steps = self._clock(), self._started_at, list(self._steps)
        spans = [(step.started_at, step.ended_at) for step in steps]
        if started_at is not None:
            spans.append((started_at, now))
        busy_s = sum(max(0.0, min(end, now) - max(start, now - WINDOW_S)) for start, end in spans)
        shown = steps[-NUM_STEPS_SHOWN:]
        handoffs = [step.handoff_s for step in shown if step.handoff_s is not None]
        return {
            "busy_ratio": min(1.0, busy_s / WINDOW_S),
            "handoff_s": sum(handoffs) / len(handoffs) if handoffs else None,
            "steps": [
                {
                    "microbatch_id": step.microbatch_id,
                    "started_at": step.started_at,
                    "duration_s": step.duration_s,
                    "num_rows": step.num_rows,
                    "num_tokens": step.num_tokens,
                }
                for step in shown
            ],
        }

    def take_traced(self) -> list[TracedStep]:
        """Those since the last call."""
        with self._lock:
            traced, self._traced = list(self._traced), deque(maxlen=MAX_TRACED_STEPS)
        return traced

    def totals(self) -> dict[str, float]:
        """Since the meter was made, for counters."""
        with self._lock:
            return {
                "num_steps": self._num_steps,
                "busy_s": self._busy_s,
                "num_handoffs": self._num_handoffs,
                "handoff_s": self._total_handoff_s,
            }
