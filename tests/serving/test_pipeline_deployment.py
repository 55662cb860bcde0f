"""`Pipeline`'s bookkeeping of requests, without Serve around it."""

import asyncio
from collections.abc import AsyncGenerator

import msgspec
import pytest

from gptj_serve.errors import OverloadedError, WireError
from gptj_serve.serving import pipeline_deployment
from gptj_serve.serving.pipeline_deployment import Pipeline
from gptj_serve.serving.ray_pipeline import HUNG_STOP_TIMEOUT_S, hung_stop_timeout_s
from gptj_serve.types import (
    EngineRequest,
    Event,
    FailureEvent,
    Grammar,
    GrammarKind,
    LoadEvent,
    ModelVersion,
    OtherVersion,
    Overload,
    Refusal,
    SamplingParams,
    Task,
    TokenEvent,
)

REQUEST = EngineRequest(
    request_id="r", task=Task.GENERATE, prompt_token_ids=[1], sampling=SamplingParams(max_new_tokens=1)
)
VERSION = ModelVersion("text", "numbers")
NUM_KV_BLOCKS = 1000


class FakeEngine:
    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.is_ready = True
        self.wait_s = 0.0
        self.waiting: list[str] = []
        self.refusal: Exception | None = None

    def add(self, request: EngineRequest, matcher: object = None) -> None:
        if self.refusal is not None:
            raise self.refusal

    def queue_wait_s(self) -> float:
        return self.wait_s

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def waiting_request_ids(self) -> list[str]:
        return self.waiting

    def stats(self) -> None:
        pass

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


def make_pipeline(engine: FakeEngine) -> Pipeline:
    pipeline = Pipeline.__new__(Pipeline)  # its constructor wants a replica's surroundings
    pipeline._engine, pipeline._replica_id, pipeline._tracing = engine, "replica", None  # type: ignore[assignment]
    pipeline._version, pipeline._num_kv_blocks = VERSION, NUM_KV_BLOCKS
    pipeline._outboxes, pipeline._outbox_of, pipeline._finished = {}, {}, {}
    return pipeline


def first(is_ready: bool, queue_wait_s: float = 0.0) -> LoadEvent:
    """As each stream begins."""
    return LoadEvent(is_ready, queue_wait_s, VERSION, num_kv_blocks=NUM_KV_BLOCKS)


def decode(batch: bytes) -> list[Event]:
    """Without what is told of the load from time to time."""
    items = msgspec.msgpack.decode(batch, type=list[Event | LoadEvent])
    return [item for item in items if not isinstance(item, LoadEvent)]


async def test_events_of_a_request_whose_grammar_took_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event stream that idles meanwhile gives up an outbox without requests; the request must not be on that one."""
    monkeypatch.setattr(pipeline_deployment, "IDLE_STREAM_S", 0.01)

    class SlowGrammars:
        async def compile_async(self, grammar: Grammar) -> None:
            await asyncio.sleep(0.1)

    pipeline = make_pipeline(FakeEngine())
    pipeline._grammars = SlowGrammars()  # type: ignore[assignment]
    sampling = SamplingParams(max_new_tokens=1, grammar=Grammar(GrammarKind.REGEX, "a"))
    request = msgspec.structs.replace(REQUEST, sampling=sampling)
    idle = asyncio.create_task(anext_all(pipeline.events("ingress", replica_id="replica")))
    call = pipeline.run("ingress", msgspec.msgpack.encode(request))
    assert await anext(call) == "replica"
    await idle
    stream = pipeline.events("ingress", replica_id="replica")
    await anext(stream)
    pipeline._distribute([FailureEvent("r", "the end")])
    assert msgspec.msgpack.decode(await asyncio.wait_for(anext(stream), 5), type=list[Event])
    await call.aclose()


async def test_ingresses_are_told_when_a_stage_is_lost_and_back() -> None:
    pipeline = make_pipeline(engine := FakeEngine())
    engine.is_ready = False
    streams = [pipeline.events(ingress, replica_id="replica") for ingress in ("a", "b")]

    async def told() -> list[object]:
        batches = [await asyncio.wait_for(anext(stream), 5) for stream in streams]
        return [msgspec.msgpack.decode(batch, type=list[LoadEvent]) for batch in batches]

    assert await told() == [[first(False)]] * 2
    pipeline._tell_readiness(True)
    pipeline._tell_readiness(False)
    assert await told() == [[LoadEvent(False)]] * 2  # as it is now
    for stream in streams:
        await stream.aclose()


async def test_ingresses_are_told_how_long_the_queue_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first events, then with others from time to time, and while there are none."""
    monkeypatch.setattr(pipeline_deployment, "LOAD_PERIOD_S", 0.05)
    monkeypatch.setattr(pipeline_deployment, "IDLE_STREAM_S", 0.2)
    pipeline = make_pipeline(engine := FakeEngine())
    engine.wait_s = 1.5
    call = pipeline.run("ingress", msgspec.msgpack.encode(REQUEST))
    await anext(call)
    stream = pipeline.events("ingress", replica_id="replica")

    async def told() -> list[object]:
        return msgspec.msgpack.decode(await asyncio.wait_for(anext(stream), 5), type=list[Event | LoadEvent])

    assert await told() == [first(True, 1.5)]
    engine.wait_s = 2.5
    await asyncio.sleep(0.1)
    pipeline._distribute([token := TokenEvent("r", 0, 1, -1.0)])
    assert await told() == [token, LoadEvent(True, 2.5)]
    engine.wait_s = 3.5
    assert await told() == [LoadEvent(True, 3.5)]
    engine.waiting = ["another ingress's", "r"]
    assert await told() == [LoadEvent(True, 3.5, None, 0, 2, ("r",))]
    await stream.aclose()
    await call.aclose()


async def test_ingresses_are_told_how_many_requests_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_deployment, "LOAD_PERIOD_S", 0.0)
    monkeypatch.setattr(pipeline_deployment, "IDLE_STREAM_S", 0.01)
    pipeline = make_pipeline(FakeEngine())
    calls = [
        pipeline.run(ingress, msgspec.msgpack.encode(msgspec.structs.replace(REQUEST, request_id=request_id)))
        for ingress, request_id in (("one", "r1"), ("one", "r2"), ("two", "r3"))
    ]
    for call in calls:
        await anext(call)

    async def told(stream: AsyncGenerator[bytes]) -> int:
        (load,) = msgspec.msgpack.decode(await asyncio.wait_for(anext(stream), 5), type=list[LoadEvent])
        return load.num_others

    streams = [pipeline.events(ingress, replica_id="replica") for ingress in ("one", "two", "three")]
    assert [await told(stream) for stream in streams] == [1, 2, 3]
    await calls[0].aclose()
    assert [await told(stream) for stream in streams[:2]] == [1, 1]
    for generator in (*streams, *calls):
        await generator.aclose()


async def test_while_a_stage_is_lost_its_ingresses_go_on_knowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without requests too: else each new one would come here first."""
    monkeypatch.setattr(pipeline_deployment, "IDLE_STREAM_S", 0.01)
    monkeypatch.setattr(pipeline_deployment, "LOAD_PERIOD_S", 0.0)
    pipeline = make_pipeline(engine := FakeEngine())
    engine.is_ready = False
    stream = pipeline.events("ingress", replica_id="replica")
    for load in (first(False), *[LoadEvent(False)] * 3):
        batch = await asyncio.wait_for(anext(stream), 5)
        assert msgspec.msgpack.decode(batch, type=list[LoadEvent]) == [load]
    engine.is_ready = True
    assert [item async for item in stream] == []
    assert not pipeline._outboxes


async def test_a_pipeline_that_is_full_says_so() -> None:
    pipeline = make_pipeline(engine := FakeEngine())
    engine.refusal, engine.wait_s = OverloadedError("too full", 2.5), 62.5
    items = [item async for item in pipeline.run("ingress", msgspec.msgpack.encode(REQUEST))]
    assert [msgspec.msgpack.decode(item, type=Refusal | Overload) for item in items] == [
        Overload("too full", 2.5, "replica", 62.5)
    ]
    assert not pipeline._outboxes


@pytest.mark.parametrize(
    ("text", "numbers", "is_taken"),
    [("", "", True), ("text", "", True), ("text", "numbers", True), ("other", "", False), ("text", "other", False)],
)
async def test_a_request_for_another_version_is_not_taken(text: str, numbers: str, is_taken: bool) -> None:
    pipeline = make_pipeline(FakeEngine())
    request = msgspec.structs.replace(REQUEST, text_version=text, numbers_version=numbers)
    call = pipeline.run("ingress", msgspec.msgpack.encode(request))
    first = await anext(call)
    if is_taken:
        assert first == "replica"
    else:
        assert isinstance(first, bytes)
        assert msgspec.msgpack.decode(first, type=OtherVersion) == OtherVersion("replica", VERSION)
        assert [item async for item in call] == []
    await call.aclose()


async def test_events_of_an_ingress_that_left_are_not_kept() -> None:
    pipeline = make_pipeline(FakeEngine())
    stream = pipeline.events("ingress", replica_id="replica")
    await anext(stream)
    pipeline._tell_readiness(False)
    await stream.aclose()
    assert not pipeline._outboxes
    call = pipeline.run("ingress", msgspec.msgpack.encode(REQUEST))
    await anext(call)
    stream = pipeline.events("ingress", replica_id="replica")
    assert msgspec.msgpack.decode(await anext(stream), type=list[LoadEvent]) == [first(True)]
    await stream.aclose()
    for _ in range(5):
        pipeline._tell_readiness(False)
        pipeline._tell_readiness(True)
    (outbox,) = pipeline._outboxes.values()  # of a request that has no stream now
    assert outbox.events == [LoadEvent(True)]
    await call.aclose()
    assert not pipeline._outboxes


async def test_last_events_wait_for_the_stream_that_is_still_to_come() -> None:
    """The request may be over before its ingress has opened one; another of its streams may end meanwhile."""
    pipeline = make_pipeline(FakeEngine())
    former = pipeline.events("ingress", replica_id="replica")
    await anext(former)
    call = pipeline.run("ingress", msgspec.msgpack.encode(REQUEST))
    await anext(call)
    pipeline._distribute([FailureEvent("r", "the end")])
    assert [item async for item in call] == []
    await former.aclose()
    stream = pipeline.events("ingress", replica_id="replica")
    await anext(stream)
    batch = await asyncio.wait_for(anext(stream), 5)
    assert decode(batch) == [FailureEvent("r", "the end")]
    await stream.aclose()
    assert not pipeline._outboxes


async def test_a_stream_that_ends_leaves_the_outbox_to_the_next_one() -> None:
    pipeline = make_pipeline(FakeEngine())
    former, later = (pipeline.events("ingress", replica_id="replica") for _ in range(2))
    await anext(former)
    await anext(later)
    await former.aclose()
    call = pipeline.run("ingress", msgspec.msgpack.encode(REQUEST))
    await anext(call)
    pipeline._distribute([FailureEvent("r", "the end")])
    batch = await asyncio.wait_for(anext(later), 5)
    assert decode(batch) == [FailureEvent("r", "the end")]
    await call.aclose()
    await later.aclose()


async def test_a_message_that_is_no_request() -> None:
    pipeline = make_pipeline(FakeEngine())
    with pytest.raises(WireError, match="6 bytes that are no EngineRequest"):
        await anext(pipeline.run("ingress", b"\x81\xa1a..."))
    assert not pipeline._outboxes


async def test_observing_goes_on_after_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline_deployment, "OBSERVATION_PERIOD_S", 0.0)
    asked = asyncio.Event()

    class Stages:
        num_calls = 0

        async def collect_reports(self) -> list[None]:
            self.num_calls += 1
            if self.num_calls == 3:
                asked.set()
                await asyncio.sleep(60)
            raise ValueError("a report of an unknown kind")

        def close(self) -> None:
            pass

    pipeline = make_pipeline(FakeEngine())
    pipeline._pipeline = Stages()  # type: ignore[assignment]
    observer = asyncio.create_task(pipeline._observe())
    await asyncio.wait_for(asked.wait(), 5)
    observer.cancel()
    lines = [record for record in caplog.records if record.name == pipeline_deployment.__name__]
    assert [record.exc_info is not None for record in lines] == [True, True]


@pytest.mark.parametrize(
    ("durations_s", "step_timeout_s", "timeout_s"),
    [
        ([[], []], 120.0, HUNG_STOP_TIMEOUT_S),  # nothing is known of steps yet
        ([[0.5, 3.0], [1.0]], 120.0, HUNG_STOP_TIMEOUT_S + 3.0),
        ([[0.5, 3.0], [1.0]], 2.0, 2.0),  # who takes longer than that hangs by definition
    ],
)
def test_a_healthy_stage_has_time_to_end_its_step_when_another_hangs(
    durations_s: list[list[float]], step_timeout_s: float, timeout_s: float
) -> None:
    measured = [{"steps": [{"duration_s": duration_s} for duration_s in stage]} for stage in durations_s]
    assert hung_stop_timeout_s(measured, step_timeout_s) == timeout_s


async def anext_all(stream: AsyncGenerator[bytes]) -> list[bytes]:
    return [item async for item in stream]


async def test_request_that_ends_while_its_client_leaves() -> None:
    """Both in one turn of the loop: the engine's step that brings the end must not fail."""
    engine = FakeEngine()
    pipeline = make_pipeline(engine)
    taken = asyncio.Event()

    async def call() -> None:
        async for _ in pipeline.run("ingress", msgspec.msgpack.encode(REQUEST)):
            taken.set()

    task = asyncio.create_task(call())
    await taken.wait()
    await asyncio.sleep(0)
    task.cancel()
    pipeline._distribute([FailureEvent("r", "the end")])
    await asyncio.gather(task, return_exceptions=True)
    assert engine.aborted == ["r"]
    assert not pipeline._outbox_of
    assert not pipeline._finished


async def test_a_client_who_leaves_while_its_grammar_is_compiled_leaves_nothing_behind() -> None:
    compiling, compiled = asyncio.Event(), asyncio.Event()

    class SlowGrammars:
        async def compile_async(self, grammar: Grammar) -> None:
            compiling.set()
            await compiled.wait()

    class CountingEngine(FakeEngine):
        num_added = 0

        def add(self, request: EngineRequest, matcher: object = None) -> None:
            self.num_added += 1

    pipeline = make_pipeline(engine := CountingEngine())
    pipeline._grammars = SlowGrammars()  # type: ignore[assignment]
    sampling = SamplingParams(max_new_tokens=1, grammar=Grammar(GrammarKind.REGEX, "a"))
    request = msgspec.structs.replace(REQUEST, sampling=sampling)

    async def call() -> None:
        async for _ in pipeline.run("ingress", msgspec.msgpack.encode(request)):
            pass

    task = asyncio.create_task(call())
    await compiling.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    compiled.set()
    await asyncio.sleep(0)
    assert engine.num_added == 0
    assert (pipeline._outboxes, pipeline._outbox_of, pipeline._finished) == ({}, {}, {})


async def test_events_of_a_request_that_is_gone_are_kept_for_nobody() -> None:
    """A step that was in flight when its client left brings one more token."""
    pipeline = make_pipeline(FakeEngine())
    stream = pipeline.events("ingress", replica_id="replica")
    await anext(stream)
    call = pipeline.run("ingress", msgspec.msgpack.encode(REQUEST))
    await anext(call)
    await call.aclose()
    pipeline._distribute([TokenEvent("r", 0, 5, -1.0)])
    (outbox,) = pipeline._outboxes.values()  # of the stream, which other requests may use
    assert (outbox.events, outbox.num_requests) == ([], 0)
    await stream.aclose()
    assert (pipeline._outboxes, pipeline._outbox_of, pipeline._finished) == ({}, {}, {})
