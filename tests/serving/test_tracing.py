"""The spans of sequences and steps, in memory."""

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from gptj_serve.engine.milestones import Milestone
from gptj_serve.pipeline.step_meter import Step, TracedStep
from gptj_serve.serving.stage_actor import StageReport
from gptj_serve.serving.tracing import MAX_LINKS, EngineTracing, tracer
from gptj_serve.types import EngineRequest, FinishReason, SamplingParams, Task, TokenEvent

STAGES = [
    {"stage_index": 0, "layers": [0, 4], "pid": 10},
    {"stage_index": 1, "layers": [4, 6], "pid": 11},
]


def make_request(request_id: str) -> EngineRequest:
    sampling = SamplingParams(max_new_tokens=2)
    return EngineRequest(request_id=request_id, task=Task.GENERATE, prompt_token_ids=[1, 2, 3], sampling=sampling)


def token(request_id: str, index: int, finish_reason: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(request_id, index, 5, -1.0, finish_reason)


class Traced:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")
        self.tracing = EngineTracing(self.tracer)

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def traced() -> Iterator[Traced]:
    traced = Traced()
    yield traced
    traced.provider.shutdown()


def test_a_sequence_is_a_span_below_the_call_that_brought_it(traced: Traced) -> None:
    with traced.tracer.start_as_current_span("call"):
        request = traced.tracing.begin(make_request("r"))
    traced.tracing.on_milestone(Milestone.QUEUED, request, 0.0)
    traced.tracing.on_milestone(Milestone.SCHEDULED, request, 0.25)
    traced.tracing.on_events([token("r", 0), token("other", 0)])
    traced.tracing.on_milestone(Milestone.PREEMPTED, request, 0.0)
    traced.tracing.on_events([token("r", 1, FinishReason.LENGTH)])
    traced.tracing.end("r")
    traced.tracing.end("r")
    span, call = traced.spans()["sequence generate"], traced.spans()["call"]
    assert span.parent is not None
    assert (span.parent.span_id, span.context.trace_id) == (call.context.span_id, call.context.trace_id)
    assert request.traceparent.startswith(f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-")
    assert dict(span.attributes or {}) == {
        "gptj.request_id": "r",
        "gptj.num_prompt_tokens": 3,
        "gptj.num_replayed_tokens": 0,
        "gptj.num_generated_tokens": 2,
        "gptj.finish_reason": "length",
    }
    assert [event.name for event in span.events] == ["queued", "scheduled", "first_token", "preempted", "finished"]
    assert dict(span.events[1].attributes or {}) == {"gptj.waited_s": 0.25}


def test_an_aborted_sequence_has_no_finish_reason(traced: Traced) -> None:
    with traced.tracer.start_as_current_span("call"):
        traced.tracing.begin(make_request("r"))
    traced.tracing.on_events([token("r", 0)])
    traced.tracing.end("r")
    attributes = traced.spans()["sequence generate"].attributes or {}
    assert attributes["gptj.num_generated_tokens"] == 1
    assert "gptj.finish_reason" not in attributes


def test_a_step_is_a_span_below_its_first_sequence_linked_to_the_others(traced: Traced) -> None:
    with traced.tracer.start_as_current_span("call"):
        first, second = traced.tracing.begin(make_request("a")), traced.tracing.begin(make_request("b"))
    step = Step(7, 1000.5, 0.25, 3, 30, None)
    traced_steps = [TracedStep(step, [first.traceparent, second.traceparent])]
    traced.tracing.on_reports(STAGES, [None, StageReport({}, {}, traced_steps)])
    span = traced.spans()["stage 1"]
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" in first.traceparent
    assert [f"{link.context.span_id:016x}" in second.traceparent for link in span.links] == [True]
    assert (span.start_time, span.end_time) == (1000.5 * 1e9, 1000.75 * 1e9)
    assert dict(span.attributes or {}) == {
        "gptj.stage_index": 1,
        "gptj.layers": "4-5",
        "gptj.pid": 11,
        "gptj.microbatch_id": 7,
        "gptj.num_rows": 3,
        "gptj.num_tokens": 30,
    }
    assert "stage 0" not in traced.spans()


def test_a_step_of_many_sequences_has_a_limited_number_of_links(traced: Traced) -> None:
    with traced.tracer.start_as_current_span("call"):
        requests = [traced.tracing.begin(make_request(str(index))) for index in range(MAX_LINKS + 9)]
    traceparents = [request.traceparent for request in requests]
    steps = [TracedStep(Step(index, 1000.0, 0.25, 1, 1, None), traceparents) for index in range(2)]
    traced.tracing.on_reports(STAGES[:1], [StageReport({}, {}, steps)])
    spans = [span for span in traced.exporter.get_finished_spans() if span.name == "stage 0"]
    assert len(spans) == 2
    for span in spans:
        linked = [f"{link.context.span_id:016x}" for link in span.links]
        assert linked == [traceparent.split("-")[2] for traceparent in traceparents[1 : MAX_LINKS + 1]]


def test_calls_that_are_not_sampled_leave_nothing(traced: Traced) -> None:
    request = make_request("r")
    assert traced.tracing.begin(request) is request  # no span at all
    unsampled = TracerProvider(sampler=ALWAYS_OFF).get_tracer("test")
    with unsampled.start_as_current_span("call"):
        assert traced.tracing.begin(request) is request
    traced.tracing.on_milestone(Milestone.QUEUED, request, 0.0)
    traced.tracing.on_events([token("r", 0, FinishReason.EOS)])
    traced.tracing.end("r")
    assert traced.spans() == {}


def test_without_a_provider_nothing_is_traced() -> None:
    assert not isinstance(trace.get_tracer_provider(), TracerProvider)
    assert tracer() is None
