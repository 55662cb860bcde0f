"""OpenTelemetry spans of sequences and of the stages' steps, where Serve's tracing is on; docs/operations.md has how.

Serve makes the spans of ingress and pipeline calls, and gives every replica its exporter. The engine's process makes
ours: one per sequence, below the span of the call that brought it, and one per step of a stage, from what the stages
report. So a stage needs no exporter of its own.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from gptj_serve.engine.milestones import Milestone
from gptj_serve.serving.stage_actor import StageReport
from gptj_serve.types import EngineRequest, Event, FailureEvent, TokenEvent, is_terminal, num_generated

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanContext, Tracer

NANOSECONDS = 1_000_000_000

MAX_LINKS = 32
"""Of a step's span. With hundreds of sequences a step they would be most of what is exported."""

MAX_SPAN_CONTEXTS = 4096
"""That are kept, of sequences whose steps have lately been reported. Each is in the rows of many steps."""


def tracer() -> "Tracer | None":
    """That of this process, if its spans go anywhere."""
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
    except ImportError:
        return None
    provider = trace.get_tracer_provider()
    return provider.get_tracer("gptj_serve") if isinstance(provider, TracerProvider) else None


class EngineTracing:
    """The spans of one engine. A sequence whose call is not traced costs a dictionary lookup per event."""

    def __init__(self, tracer: "Tracer") -> None:
        self._tracer = tracer
        self._spans: dict[str, Span] = {}  # by request id
        self._num_generated: dict[str, int] = {}

    def begin(self, request: EngineRequest) -> EngineRequest:
        """Start the sequence's span, if the current one is sampled; returns the request with its `traceparent`."""
        from opentelemetry import trace

        if not trace.get_current_span().get_span_context().trace_flags.sampled:
            return request
        span = self._tracer.start_span(
            f"sequence {request.task}",
            attributes={
                "gptj.request_id": request.request_id,
                "gptj.num_prompt_tokens": request.num_prompt_tokens,
                "gptj.num_replayed_tokens": len(request.output_token_ids),
            },
        )
        self._spans[request.request_id] = span
        self._num_generated[request.request_id] = 0
        return msgspec.structs.replace(request, traceparent=_traceparent(span))

    def end(self, request_id: str) -> None:
        """The call is over, whatever the sequence came to."""
        if (span := self._spans.pop(request_id, None)) is not None:
            span.set_attribute("gptj.num_generated_tokens", self._num_generated.pop(request_id))
            span.end()

    def on_milestone(self, milestone: Milestone, request: EngineRequest, elapsed_s: float) -> None:
        if (span := self._spans.get(request.request_id)) is not None:
            span.add_event(milestone.value, {"gptj.waited_s": elapsed_s})

    def on_events(self, events: Iterable[Event]) -> None:
        if not self._spans:
            return
        for event in events:
            span = self._spans.get(event.request_id)
            if span is None:
                continue
            if self._num_generated[event.request_id] == 0 and isinstance(event, TokenEvent):
                span.add_event("first_token")
            self._num_generated[event.request_id] += num_generated(event)
            if is_terminal(event):
                span.add_event("finished")
                span.set_attribute("gptj.finish_reason", _finish_reason(event))

    def on_reports(self, stages: Sequence[dict[str, Any]], reports: Sequence[StageReport | None]) -> None:
        """A span for each step of a stage that had traced sequences: below the first one's, linked to others'."""
        from opentelemetry.trace import Link, NonRecordingSpan, set_span_in_context

        for stage, report in zip(stages, reports, strict=True):
            for step, traceparents in report.traced if report is not None else ():
                parent, *others = map(_span_context, traceparents[: 1 + MAX_LINKS])
                first, end = stage["layers"]
                span = self._tracer.start_span(
                    f"stage {stage['stage_index']}",
                    context=set_span_in_context(NonRecordingSpan(parent)),
                    links=list(map(Link, others)),
                    start_time=int(step.started_at * NANOSECONDS),
                    attributes={
                        "gptj.stage_index": stage["stage_index"],
                        "gptj.layers": f"{first}-{end - 1}",
                        "gptj.pid": stage["pid"],
                        "gptj.microbatch_id": step.microbatch_id,
                        "gptj.num_rows": step.num_rows,
                        "gptj.num_tokens": step.num_tokens,
                    },
                )
                span.end(int(step.ended_at * NANOSECONDS))


def _traceparent(span: "Span") -> str:
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier["traceparent"]


@lru_cache(MAX_SPAN_CONTEXTS)
def _span_context(traceparent: str) -> "SpanContext":
    from opentelemetry.trace import get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": traceparent})
    return get_current_span(context).get_span_context()


def _finish_reason(event: Event) -> str:
    if isinstance(event, TokenEvent):
        return str(event.finish_reason)
    return "failed" if isinstance(event, FailureEvent) else "answered"
