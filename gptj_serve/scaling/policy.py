"""`ScalingPolicy`: how many pipelines there should be, from what each has to do, how fast it is and how full its KV.

What is needed is the larger of two numbers: pipelines that get through the whole backlog within the target time, at the
speed they show; and pipelines over which the KV blocks in use spread to the target share. Up, it is followed after a
short delay and all the way. Down, only what was needed at most over a whole delay without a higher need; and judged by
stricter targets (`DOWN_SHARE`), so that a load between the two keeps the number as it is. Neither noise around a
target nor a pause shorter than the delay makes it flap.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

DOWN_SHARE = 0.7
"""Of the targets: fewer pipelines must be good enough with that much less."""

_TOLERANCE = 1e-9


class PipelineLoad(NamedTuple):
    """Of one pipeline that runs, as its engine knows it."""

    num_tokens_waiting: int  # prompt tokens to compute and new tokens to make, of requests that wait or run
    tokens_per_s: float  # how fast it got through them lately while requests waited; 0 when not known yet
    kv_share: float  # of its KV blocks that running sequences hold, 0..1
    num_waiting: int  # requests that wait for their turn
    num_running: int  # requests that have it


class ScalingLimits(NamedTuple):
    """`ServiceConfig.autoscaling` as the policy needs it."""

    min_pipelines: int
    max_pipelines: int
    target_drain_s: float
    target_kv_share: float
    upscale_delay_s: float
    downscale_delay_s: float
    scale_to_zero_delay_s: float  # without any request, before the last pipeline goes; where min_pipelines is 0


class ScalingPolicy:
    """Knows no clock but what `decide` is told, and keeps what it has to remember between its calls."""

    def __init__(self, limits: ScalingLimits) -> None:
        self._limits = limits
        self._tokens_per_s = 0.0  # of one pipeline, as far as known
        self._num_target: int | None = None  # at the last decision
        self._higher: _Span | None = None  # more were needed than there should be
        self._lower: _Span | None = None  # fewer were
        self._idle: _Span | None = None

    def decide(
        self, now_s: float, loads: Sequence[PipelineLoad], num_target: int, num_requests_without_pipeline: int
    ) -> int:
        """How many there should be, where `num_target` is what should be so far; to be asked every second or so.

        `loads` are of those that run, which may be fewer (some start) or more (some end). `now_s` never goes back.
        """
        limits = self._limits
        if num_target != self._num_target:  # whatever was seen so far says nothing of another number
            self._num_target, self._higher, self._lower = num_target, None, None
        if not limits.min_pipelines <= num_target <= limits.max_pipelines:
            return min(max(num_target, limits.min_pipelines), limits.max_pipelines)
        if num_target == 0:
            self._idle = None
            return 1 if num_requests_without_pipeline > 0 else 0
        is_idle = num_requests_without_pipeline == 0 and not any(map(_is_busy, loads))
        if not loads:  # they start, or were lost and are started again: nothing is known of what they will do
            self._higher = self._lower = self._idle = None
            return num_target
        self._learn_speed(loads)
        num_needed = self._num_needed(loads, num_requests_without_pipeline, 1.0)
        num_enough = max(num_needed, self._num_needed(loads, num_requests_without_pipeline, DOWN_SHARE))
        self._higher = _longer(self._higher, now_s, num_needed) if num_needed > num_target else None
        self._lower = _longer(self._lower, now_s, num_enough) if num_enough < num_target else None
        self._idle = _longer(self._idle, now_s, 0) if is_idle and limits.min_pipelines == 0 else None
        if self._higher is not None and self._higher.has_lasted(now_s, limits.upscale_delay_s):
            return self._higher.lowest
        if num_target == 1 and self._idle is not None and self._idle.has_lasted(now_s, limits.scale_to_zero_delay_s):
            return 0
        if self._lower is not None and self._lower.has_lasted(now_s, limits.downscale_delay_s):
            return self._lower.highest
        return num_target

    def _learn_speed(self, loads: Sequence[PipelineLoad]) -> None:
        known = [load.tokens_per_s for load in loads if load.tokens_per_s > 0]
        if known:
            self._tokens_per_s = sum(known) / len(known)

    def _num_needed(self, loads: Sequence[PipelineLoad], num_requests_without_pipeline: int, share: float) -> int:
        """With this share of the targets; from 1 and `min_pipelines` to `max_pipelines`."""
        limits = self._limits
        num_waiting = sum(load.num_waiting for load in loads) + num_requests_without_pipeline
        # A request's blocks are on one pipeline, however full they make it.
        by_kv = ceil(sum(load.kv_share for load in loads) / (share * limits.target_kv_share) - _TOLERANCE)
        num_needed = min(by_kv, sum(load.num_running for load in loads) + num_waiting)
        num_needed = max(1, limits.min_pipelines, num_needed)
        if self._tokens_per_s > 0:
            num_tokens = sum(load.num_tokens_waiting for load in loads)
            by_drain = ceil(num_tokens / (self._tokens_per_s * share * limits.target_drain_s) - _TOLERANCE)
            # What runs stays where it is, and each that waits runs on one: more pipelines would have nothing to do.
            num_needed = max(num_needed, min(by_drain, len(loads) + num_waiting))
        return min(num_needed, limits.max_pipelines)


class _Span(NamedTuple):
    """A time in which other numbers were needed than there should be, and the extremes of these."""

    since_s: float
    lowest: int
    highest: int

    def has_lasted(self, now_s: float, delay_s: float) -> bool:
        return now_s - self.since_s + _TOLERANCE >= delay_s


def _longer(span: _Span | None, now_s: float, num_needed: int) -> _Span:
    if span is None:
        return _Span(now_s, num_needed, num_needed)
    return _Span(span.since_s, min(span.lowest, num_needed), max(span.highest, num_needed))


def _is_busy(load: PipelineLoad) -> bool:
    return load.num_tokens_waiting > 0 or load.num_waiting > 0 or load.kv_share > 0
