"""What Prometheus reads from Ray's own endpoint, with the prefix `ray_`; docs/operations.md lists it.

An observation costs about 2 µs, once per token at most. What the engine counts is taken over once a second.
"""

from collections.abc import Sequence
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from gptj_serve.api.request_record import RequestRecord
from gptj_serve.engine.milestones import Milestone
from gptj_serve.routing.choice import RoutedBy
from gptj_serve.serving.stage_actor import StageReport
from gptj_serve.types import EngineRequest, EngineStats

REQUEST_BUCKETS_S = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0]
TOKEN_BUCKETS_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
QUEUE_BUCKETS_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]

_GAUGES = {
    "num_running": "Sequences that hold KV blocks",
    "num_waiting": "Requests that wait for KV blocks",
    "num_tokens_waiting": "Tokens that are not computed yet, of running and waiting requests",
    "queue_wait_s": "Seconds that a request of priority 0 would wait for its turn, as estimated",
    "num_microbatches_in_flight": "Microbatches on their way through the stages",
    "num_kv_blocks": "Size of the KV pool",
    "num_kv_blocks_used": "KV blocks in use",
}
_COUNTERS = {
    "num_prompt_tokens": ("prompt_tokens", "Prompt tokens of the requests that the engine took"),
    "num_tokens_generated": ("generated_tokens", "Generated tokens"),
    "num_preemptions": ("preemptions", "Times that a request gave up its KV blocks, to be computed again"),
    "num_prefix_tokens": ("prefix_tokens", "Tokens that the blocks of other requests might have held"),
    "num_prefix_tokens_reused": ("prefix_tokens_reused", "Of these, tokens that they did hold"),
    "num_tokens_drafted": ("drafted_tokens", "Tokens drafted by prompt lookup"),
    "num_draft_tokens_accepted": ("accepted_draft_tokens", "Of these, tokens that were right"),
    "num_rows_ahead": ("rows_ahead", "Rows that were scheduled while their token was still being chosen"),
    "num_rows_ahead_wasted": ("rows_ahead_wasted", "Of these, rows of requests that had ended by then"),
    "num_requests_not_finite": ("requests_not_finite", "Sequences that failed, their numbers being NaN or infinite"),
    "num_recoveries": ("recoveries", "Times that a pipeline was lost and brought back"),
}
_STAGE_COUNTERS = {
    "num_steps": ("stage_steps", "Microbatches computed by a stage"),
    "busy_s": ("stage_busy_seconds", "Time that a stage has computed"),
    "num_handoffs": ("stage_handoffs", "Hidden states that a stage was handed"),
    "handoff_s": ("stage_handoff_seconds", "Time that these handoffs took"),
}


class RequestMetrics:
    """What clients see, measured in the ingress: the `Observer` of its requests."""

    def __init__(self, model: str) -> None:
        tags = {"model": model}

        def histogram(name: str, description: str, buckets: list[float], *tag_keys: str) -> Histogram:
            metric = Histogram(f"gptj_{name}", description, buckets, ("model", *tag_keys))
            return metric.set_default_tags(tags)

        self._first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", REQUEST_BUCKETS_S
        )
        self._next_token = histogram(
            "inter_token_latency_seconds", "From a token of a sequence to its next", TOKEN_BUCKETS_S
        )
        self._duration = histogram(
            "request_seconds", "From a request's arrival to the end of its answer", REQUEST_BUCKETS_S, "task"
        )
        self._requests = Counter(
            "gptj_requests", "Requests that have ended", ("model", "task", "outcome")
        ).set_default_tags(tags)
        self._replays = Counter(
            "gptj_replays", "Times that a sequence was sent to a pipeline again, its own being lost", ("model",)
        ).set_default_tags(tags)

        self._routes = Counter(
            "gptj_routes", "Times that a sequence was sent to a pipeline, by what it was chosen for", ("model", "by")
        ).set_default_tags(tags)

    def first_token(self, record: RequestRecord, seconds: float) -> None:
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._next_token.observe(seconds)

    def ended(self, record: RequestRecord) -> None:
        task = str(record.task or "none")  # none: it was refused before
        self._requests.inc(1, {"task": task, "outcome": str(record.outcome)})
        if record.task is not None:
            self._duration.observe(record.e2e_s, {"task": task})

    def replayed(self) -> None:
        self._replays.inc()

    def routed(self, by: RoutedBy) -> None:
        self._routes.inc(1, {"by": str(by)})


class PipelineMetrics:
    """What one pipeline's engine and stages do."""

    def __init__(self, model: str) -> None:
        tags = {"model": model}
        self._gauges = {
            field: Gauge(f"gptj_{field}", description, ("model",)).set_default_tags(tags)
            for field, description in _GAUGES.items()
        }

        def total(name: str, description: str, *tag_keys: str) -> RunningTotal:
            counter = Counter(f"gptj_{name}", description, ("model", *tag_keys)).set_default_tags(tags)
            return RunningTotal(counter, *tag_keys)

        self._counters = {field: total(*described) for field, described in _COUNTERS.items()}
        self._stage_counters = {field: total(*described, "stage") for field, described in _STAGE_COUNTERS.items()}
        self._restarts = total("stage_restarts", "Times that a stage's process was replaced", "stage")
        self._queue = Histogram(
            "gptj_queue_seconds",
            "From a request's arrival at the engine to its first microbatch",
            QUEUE_BUCKETS_S,
            ("model", "task"),
        ).set_default_tags(tags)

    def on_milestone(self, milestone: Milestone, request: EngineRequest, elapsed_s: float) -> None:
        if milestone is Milestone.SCHEDULED:
            self._queue.observe(elapsed_s, {"task": str(request.task)})

    def report(
        self, stats: EngineStats, stages: Sequence[dict[str, Any]], reports: Sequence[StageReport | None]
    ) -> None:
        """Take over what the engine and its stages, as `stage_statuses` and `collect_reports` tell of them, count."""
        for field, gauge in self._gauges.items():
            gauge.set(getattr(stats, field))
        for index, (stage, report) in enumerate(zip(stages, reports, strict=True)):
            self._restarts.advance_to(stage["num_restarts"], str(index))
            if report is not None:
                for field, counter in self._stage_counters.items():
                    counter.advance_to(report.totals[field], str(index))
        for field, counter in self._counters.items():
            counter.advance_to(getattr(stats, field))


class RunningTotal:
    """A counter of what someone else counts, for each value of the tag `key`, if there is one.

    A total that is less than it was began again at 0.
    """

    def __init__(self, counter: Counter, key: str | None = None) -> None:
        self._counter = counter
        self._key = key
        self._totals: dict[str, float] = {}

    def advance_to(self, total: float, value: str = "") -> None:
        last = self._totals.get(value, 0)
        increase = total - last if total >= last else total
        self._totals[value] = total
        if increase > 0:
            self._counter.inc(increase, None if self._key is None else {self._key: value})
