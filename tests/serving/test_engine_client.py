"""`ServeEngineClient` over a handle that misbehaves as replicas do; no cluster."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.serve.exceptions import RayServeException

from gptj_serve.errors import InvalidRequestError, OverloadedError, RequestFailedError, WireError
from gptj_serve.routing.choice import PipelineChoice, RoutedBy
from gptj_serve.serving import calls, engine_client, pipeline_counts
from gptj_serve.serving.engine_client import ServeEngineClient
from gptj_serve.serving.pipeline_counts import PipelineCounts, PipelineStates
from gptj_serve.serving.replicas import REFUSAL_COUNTS_S, Replicas
from gptj_serve.types import (
    EngineRequest,
    FailureEvent,
    FinishReason,
    Grammar,
    GrammarKind,
    LoadEvent,
    Matrix,
    ModelVersion,
    Overload,
    PromptEvent,
    Refusal,
    SamplingParams,
    Task,
    TokenEvent,
)

NUM_TOKENS = 6
REQUEST = EngineRequest(
    request_id="r", task=Task.GENERATE, prompt_token_ids=[1], sampling=SamplingParams(max_new_tokens=NUM_TOKENS)
)


class Call:
    """What a streaming handle call returns."""

    def __init__(self, stream: AsyncGenerator[Any]) -> None:
        self._stream = stream
        self.is_cancelled = False

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._stream)

    def cancel(self) -> None:
        self.is_cancelled = True


class Method:
    def __init__(self, stream: Callable[..., AsyncGenerator[Any]]) -> None:
        self._stream = stream
        self.calls: list[Call] = []

    def remote(self, *args: Any, **kwargs: Any) -> Call:
        self.calls.append(Call(self._stream(*args, **kwargs)))
        return self.calls[-1]


class FakePipelines:
    """Replicas "0", "1", … in turn: each attempt of a request goes to the next one. `lives` says how many tokens each
    replica gives before it is lost; the last replica gives all."""

    def __init__(
        self, *lives: int, loses_events: bool = False, num_giving_up: int = 0, is_reachable: bool = True
    ) -> None:
        self.lives = [*lives, 10**9]
        self.num_giving_up = num_giving_up  # so many replicas lose their stages over the request
        self.is_reachable = is_reachable
        self.loses_events = loses_events
        self.attempts: list[EngineRequest] = []
        self.outboxes: dict[str, asyncio.Queue[bytes | Exception]] = {}
        self.stall_after: dict[str, int] = {}  # replica → tokens of an attempt, after which it gives none for a while
        self.stalled = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.run, self.events = Method(self._run), Method(self._events)

    def options(self, **_: Any) -> "FakePipelines":
        return self

    async def _run(self, _ingress: str, encoded: bytes) -> AsyncGenerator[str]:
        replica_id = str(len(self.attempts))
        request = msgspec.msgpack.decode(encoded, type=EngineRequest)
        self.attempts.append(request)
        outbox = self.outboxes[replica_id] = asyncio.Queue()
        if not self.is_reachable:
            raise ActorUnavailableError("gone", None)
        yield replica_id
        if int(replica_id) < self.num_giving_up:
            failure = FailureEvent(request.request_id, "lost again and again", is_pipeline_at_fault=True)
            outbox.put_nowait(msgspec.msgpack.encode([failure]))
            return
        if request.sampling is not None and request.sampling.prompt_logprobs:
            outbox.put_nowait(msgspec.msgpack.encode([PromptEvent(request.request_id, Matrix.of([[-1.0]]))]))
        for life, index in enumerate(range(len(request.output_token_ids), NUM_TOKENS)):
            if life == self.lives[min(int(replica_id), len(self.lives) - 1)]:
                outbox.put_nowait(ActorUnavailableError("gone", None))
                raise ActorUnavailableError("gone", None)
            reason = FinishReason.LENGTH if index == NUM_TOKENS - 1 else None
            event = TokenEvent(request.request_id, index, 100 + index, -1.0, reason)
            if not (self.loses_events and replica_id == "0"):
                outbox.put_nowait(msgspec.msgpack.encode([event]))
            if self.stall_after.get(replica_id) == life + 1:
                self.stalled.set()
                await self.goes_on.wait()
            await asyncio.sleep(0.001)

    async def _events(self, _ingress: str, *, replica_id: str) -> AsyncGenerator[bytes]:
        yield msgspec.msgpack.encode([])
        while True:
            item = await self.outboxes[replica_id].get()
            if isinstance(item, Exception):
                raise item
            yield item


def make_client(
    pipelines: FakePipelines,
    on_replay: Callable[[], None] = lambda: None,
    replicas: Replicas | None = None,
    replay_timeout_s: float = 120.0,
    max_queue_wait_s: float | None = None,
    on_route: Callable[[RoutedBy], None] = lambda _: None,
    choice: PipelineChoice | None = None,
) -> ServeEngineClient:
    return ServeEngineClient(
        pipelines,  # type: ignore[arg-type]
        on_replay,
        Replicas() if replicas is None else replicas,
        on_route,
        choice=choice or PipelineChoice(16, 1024),
        replay_timeout_s=replay_timeout_s,
        max_queue_wait_s=max_queue_wait_s,
    )


async def all_of(stream: AsyncGenerator[Any]) -> list[Any]:
    return [event async for event in stream]


async def collect(
    pipelines: FakePipelines,
    request: EngineRequest = REQUEST,
    replicas: Replicas | None = None,
    replay_timeout_s: float = 120.0,
) -> list[Any]:
    client = make_client(pipelines, replicas=replicas, replay_timeout_s=replay_timeout_s)
    return [event async for event in client.submit(request)]


async def test_lost_replicas_are_only_pauses() -> None:
    pipelines = FakePipelines(2, 0, 3)
    events = await asyncio.wait_for(collect(pipelines), 10)
    assert [(event.index, event.token_id) for event in events] == [(i, 100 + i) for i in range(NUM_TOKENS)]
    assert [len(attempt.output_token_ids) for attempt in pipelines.attempts] == [0, 2, 2, 5]
    assert len({attempt.request_id for attempt in pipelines.attempts}) == 4


async def test_a_request_that_can_not_be_sent_leaves_nothing_behind() -> None:
    grammar = Grammar(GrammarKind.REGEX, "\ud800")
    sampling = SamplingParams(max_new_tokens=NUM_TOKENS, grammar=grammar)
    pipelines = FakePipelines()
    client = make_client(pipelines)
    with pytest.raises(UnicodeEncodeError):
        await anext(client.submit(msgspec.structs.replace(REQUEST, sampling=sampling)))
    assert (client._streams._attempts, pipelines.attempts) == ({}, [])


async def test_another_attempt_owes_only_the_rest() -> None:
    """The prompt's scores come once, and max_time_s goes on from the request's beginning."""
    sampling = SamplingParams(max_new_tokens=NUM_TOKENS, prompt_logprobs=True, max_time_s=60.0)
    pipelines = FakePipelines(2)
    events = await asyncio.wait_for(collect(pipelines, msgspec.structs.replace(REQUEST, sampling=sampling)), 10)
    assert [type(event) for event in events] == [PromptEvent, *[TokenEvent] * NUM_TOKENS]
    first, second = (attempt.sampling for attempt in pipelines.attempts)
    assert first is not None
    assert second is not None
    assert (first.prompt_logprobs, second.prompt_logprobs) == (True, False)
    assert second.max_time_s is not None
    assert 50 < second.max_time_s < 60 - engine_client.REPLAY_DELAY_S / 2


async def test_request_that_gets_no_further_is_given_up() -> None:
    pipelines = FakePipelines(is_reachable=False)
    events = await asyncio.wait_for(collect(pipelines, replay_timeout_s=0.3), 20)
    assert events == [FailureEvent("r", "no pipeline took the request further for 0.3 s")]


class LastOne(FakePipelines):
    """The first replica is lost, and no other comes; the router keeps the call."""

    async def _run(self, _ingress: str, encoded: bytes) -> AsyncGenerator[str]:
        if self.attempts:
            await asyncio.sleep(60)
        async for item in super()._run(_ingress, encoded):
            yield item


@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_request_that_no_replica_takes_again_is_given_up(num_tokens: int) -> None:
    """Once, though the call to the router goes on."""
    pipelines = LastOne(num_tokens)
    events = await asyncio.wait_for(collect(pipelines, replay_timeout_s=0.3), 5)
    assert [event.index for event in events[:-1]] == list(range(num_tokens))
    assert events[-1] == FailureEvent("r", "no pipeline took the request further for 0.3 s")
    assert len(pipelines.run.calls) == 2
    assert pipelines.run.calls[-1].is_cancelled


async def test_a_replica_that_took_the_request_again_has_its_time() -> None:
    """It may need longer than a replica may be sought for."""
    pipelines = FakePipelines(0)
    pipelines.stall_after["1"] = 1
    answer = asyncio.create_task(collect(pipelines, replay_timeout_s=0.2))
    await asyncio.wait_for(pipelines.stalled.wait(), 5)
    await asyncio.sleep(0.3)
    pipelines.goes_on.set()
    assert [event.index for event in await asyncio.wait_for(answer, 5)] == list(range(NUM_TOKENS))


async def test_the_time_to_find_another_replica_begins_with_the_loss() -> None:
    """However long the first one had the request before."""
    pipelines = FakePipelines(1)
    pipelines.stall_after["0"] = 1
    answer = asyncio.create_task(collect(pipelines, replay_timeout_s=0.2))
    await asyncio.wait_for(pipelines.stalled.wait(), 5)
    await asyncio.sleep(0.3)
    pipelines.goes_on.set()
    assert [event.index for event in await asyncio.wait_for(answer, 5)] == list(range(NUM_TOKENS))


async def test_request_that_replicas_die_of_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token counts as a new beginning."""
    monkeypatch.setattr(engine_client, "REPLAY_DELAY_S", 0.001)
    monkeypatch.setattr(engine_client, "MAX_REPLAY_DELAY_S", 0.001)
    limit = engine_client.MAX_REPLICA_LOSSES
    pipelines = FakePipelines(*[0] * (limit - 1), 1, *[0] * 50)
    token, failure = await asyncio.wait_for(collect(pipelines), 10)
    assert (token.index, type(failure)) == (0, FailureEvent)
    assert "5 pipelines in a row" in failure.message
    assert len(pipelines.attempts) == 2 * limit - 1


@pytest.mark.parametrize("num_giving_up", [1, 2])
async def test_request_that_a_pipeline_gave_up_is_tried_on_one_more(num_giving_up: int) -> None:
    pipelines = FakePipelines(num_giving_up=num_giving_up)
    events = await asyncio.wait_for(collect(pipelines), 10)
    assert len(pipelines.attempts) == 2
    if num_giving_up == 1:
        assert [event.index for event in events] == list(range(NUM_TOKENS))
    else:
        (failure,) = events
        assert (type(failure), failure.message) == (FailureEvent, "lost again and again")


async def test_request_whose_events_do_not_come_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "END_TIMEOUT_S", 0.2)
    pipelines = FakePipelines(loses_events=True)
    events = await asyncio.wait_for(collect(pipelines), 10)
    assert [event.index for event in events] == list(range(NUM_TOKENS))
    assert len(pipelines.attempts) == 2


async def leaving(event: str, *, others: bool) -> FakePipelines:
    """A request has two tokens of replica "0" when that leaves, or loses a stage; then it goes on after all."""
    replicas = Replicas()
    replicas.set_running({"0", "1"} if others else {"0"})
    pipelines = FakePipelines()
    pipelines.stall_after["0"] = 2
    answer = asyncio.create_task(collect(pipelines, replicas=replicas))
    await asyncio.wait_for(pipelines.stalled.wait(), 5)
    if event == "stops":
        replicas.set_running(replicas.running - {"0"})
    else:
        pipelines.outboxes["0"].put_nowait(msgspec.msgpack.encode([LoadEvent(False)]))
    await asyncio.sleep(0.05)
    assert replicas.recovering == ({"0"} if event == "loses a stage" else set())
    pipelines.goes_on.set()
    events = await asyncio.wait_for(answer, 5)
    assert [(event.index, event.token_id) for event in events] == [(i, 100 + i) for i in range(NUM_TOKENS)]
    return pipelines


@pytest.mark.parametrize("event", ["stops", "loses a stage"])
async def test_requests_leave_a_replica_that_leaves_them(event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: another one is there."""
    monkeypatch.setattr(engine_client, "REPLAY_DELAY_S", 60.0)
    pipelines = await leaving(event, others=True)
    assert [attempt.output_token_ids for attempt in pipelines.attempts] == [[], [100, 101]]


@pytest.mark.parametrize("event", ["stops", "loses a stage"])
async def test_requests_stay_where_there_is_nowhere_else(event: str) -> None:
    pipelines = await leaving(event, others=False)
    assert len(pipelines.attempts) == 1


async def test_what_may_have_cost_a_stage_does_not_go_on_to_the_next() -> None:
    """It was there when a first one was lost, and has got no further: the scheduler of the second shall find out."""
    replicas = Replicas()
    replicas.set_running({"0", "1", "2"})
    pipelines = FakePipelines(0)
    pipelines.stall_after["1"] = 0
    client = make_client(pipelines, replicas=replicas)
    stream = client.submit(REQUEST)
    first = asyncio.create_task(anext(stream))
    while len(pipelines.attempts) < 2:
        await asyncio.sleep(0.001)
    pipelines.outboxes["1"].put_nowait(msgspec.msgpack.encode([LoadEvent(False)]))
    assert (await asyncio.wait_for(first, 5)).index == 0
    assert len([event async for event in stream]) == NUM_TOKENS - 1
    assert len(pipelines.attempts) == 2


async def test_a_pool_counts_with_the_size_that_its_pipeline_tells() -> None:
    """Where stages size it themselves no ingress knows it beforehand."""

    class Telling(FakePipelines):
        async def _events(self, ingress: str, *, replica_id: str) -> AsyncGenerator[bytes]:
            yield msgspec.msgpack.encode([LoadEvent(True, version=ModelVersion("t", "n"), num_kv_blocks=7)])
            async for item in super()._events(ingress, replica_id=replica_id):
                yield item

    class Choice(PipelineChoice):
        told: dict[str, int]

        def set_pool(self, pipeline: str, max_blocks: int) -> None:
            self.told = {pipeline: max_blocks}

    choice = Choice(16, 1024)
    events = [event async for event in make_client(Telling(), choice=choice).submit(REQUEST)]
    assert len(events) == NUM_TOKENS
    assert choice.told == {"0": 7}


class Asked(FakePipelines):
    """Pipelines that are asked for their status: those in `silent` don't answer, and one in `dead` can't."""

    def __init__(self, *replica_ids: str) -> None:
        super().__init__()
        self.replica_ids = replica_ids
        self.silent: set[str] = set()
        self.dead: set[str] = set()

    def broadcast(self, method: str) -> "Asked":
        assert method == "status"
        return self

    async def _fetch_replica_results_async(self) -> list[Any]:
        if not self.replica_ids:
            raise RayServeException("no replica is running")
        return [Answer(self, replica_id) for replica_id in self.replica_ids]


class Answer:
    def __init__(self, pipelines: Asked, replica_id: str) -> None:
        self._pipelines, self._replica_id = pipelines, replica_id

    async def get_async(self) -> dict[str, str]:
        if self._replica_id in self._pipelines.dead:
            raise ActorUnavailableError("gone", None)
        if self._replica_id in self._pipelines.silent:
            await asyncio.sleep(60)
        return {"replica_id": self._replica_id}


async def test_a_silent_pipeline_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "STATUS_TIMEOUT_S", 0.1)
    pipelines = Asked("c", "a", "b")
    client = make_client(pipelines)
    assert await client.status() == ([{"replica_id": "a"}, {"replica_id": "b"}, {"replica_id": "c"}], [])
    pipelines.silent = {"b"}
    for _ in range(2):  # it is remembered who it was
        answered, problems = await client.status()
        assert answered == [{"replica_id": "a"}, {"replica_id": "c"}]
        assert problems == ["pipeline b does not answer: TimeoutError"]
    pipelines.silent, pipelines.dead = set(), {"c"}
    answered, problems = await client.status()
    assert answered == [{"replica_id": "a"}, {"replica_id": "b"}]
    assert len(problems) == 1
    assert "pipeline c does not answer" in problems[0]
    pipelines.dead = set()
    assert (await client.status())[1] == []


async def test_no_pipeline_at_all_is_a_problem_too() -> None:
    client = make_client(Asked())
    assert await client.status() == ([], ["no pipeline can be asked: no replica is running"])


async def test_no_pipeline_is_no_problem_where_requests_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as they do."""
    monkeypatch.setattr(pipeline_counts, "TIMEOUT_S", 10.0)
    replicas = Replicas()
    states = PipelineStates({"STARTING": 1})
    client = ServeEngineClient(
        Asked(),  # type: ignore[arg-type]
        replicas=replicas,
        choice=PipelineChoice(16, 1024),
        replay_timeout_s=1.0,
        counts=PipelineCounts(lambda: states),
        may_have_none=True,
    )
    assert await client.status() == ([], [])
    assert await client.pipeline_changes() == {"num_starting": 1, "num_stopping": 0}
    states = PipelineStates({"STARTING": 1}, "no pipeline starts: no such file")
    assert await client.status() == ([], ["no pipeline starts: no such file"])
    replicas.set_running({"a"})
    assert await client.status() == ([], ["no pipeline can be asked: no replica is running"])


async def test_each_replay_is_told() -> None:
    replays: list[None] = []
    client = make_client(FakePipelines(2, 3), lambda: replays.append(None))
    assert len([event async for event in client.submit(REQUEST)]) == NUM_TOKENS
    assert len(replays) == 2


@pytest.mark.parametrize("timeout_s", [60.0, -1.0])
async def test_what_is_given_up_is_no_replay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, timeout_s: float
) -> None:
    """Neither counted nor logged as one, whichever limit it is given up by."""
    monkeypatch.setattr(engine_client, "REPLAY_DELAY_S", 0.001)
    replays: list[None] = []
    pipelines = FakePipelines(*[0] * 50)
    client = make_client(pipelines, lambda: replays.append(None), replay_timeout_s=timeout_s)
    (failure,) = [event async for event in client.submit(REQUEST)]
    assert isinstance(failure, FailureEvent)
    assert len(pipelines.attempts) == (1 if timeout_s < 0 else engine_client.MAX_REPLICA_LOSSES)
    assert len(replays) == len(pipelines.attempts) - 1
    lines = [record.getMessage() for record in caplog.records if record.name == engine_client.__name__]
    assert len(lines) == len(replays)
    assert all("request r is sent again after 0 tokens: " in line for line in lines)


async def test_a_pipeline_that_can_not_read_a_request_is_not_lost() -> None:
    class OfAnotherVersion(FakePipelines):
        async def _run(self, _ingress: str, encoded: bytes) -> AsyncGenerator[str]:
            self.attempts.append(REQUEST)
            raise RayTaskError("run", "a traceback", WireError("9 bytes that are no EngineRequest: truncated"))
            yield ""

    pipelines = OfAnotherVersion()
    message = "the pipeline could not read the request: 9 bytes that are no EngineRequest: truncated"
    with pytest.raises(RequestFailedError, match=message):
        await asyncio.wait_for(collect(pipelines), 10)
    assert len(pipelines.attempts) == 1


async def test_a_refusal_comes_back_as_it_was_raised() -> None:
    class Refusing(FakePipelines):
        async def _run(self, _ingress: str, encoded: bytes) -> AsyncGenerator[bytes]:
            yield msgspec.msgpack.encode(Refusal("grammar", "a(", "does not end"))

    with pytest.raises(InvalidRequestError, match=r"grammar='a\(': does not end"):
        await asyncio.wait_for(collect(Refusing()), 10)


class Queued(FakePipelines):
    """No replica takes the request yet."""

    async def _run(self, _ingress: str, encoded: bytes) -> AsyncGenerator[str]:
        self.stalled.set()
        await asyncio.Event().wait()
        yield ""


class Taken(FakePipelines):
    """A replica has the request, and computes its prompt."""

    async def _run(self, _ingress: str, encoded: bytes) -> AsyncGenerator[str]:
        self.outboxes["0"] = asyncio.Queue()
        yield "0"
        self.stalled.set()
        await asyncio.Event().wait()


async def test_a_request_counts_where_it_is_taken_before_it_is_answered() -> None:
    """Nobody preferred that replica, and the next requests are not to be sent there as if it were idle."""
    choice = PipelineChoice(16, 1024)
    client = make_client(pipelines := Taken(), choice=choice)
    request = msgspec.structs.replace(REQUEST, prompt_token_ids=list(range(40)))
    reader = asyncio.create_task(all_of(client.submit(request)))
    await asyncio.wait_for(pipelines.stalled.wait(), 5)
    assert (choice.num_requests("0"), choice.num_tokens_due("0")) == (1, 40)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    assert (choice.num_requests("0"), choice.num_tokens_due("0")) == (0, 0)


@pytest.mark.parametrize("phase", ["queued", "taken", "tokens", "before a replay", "replayed"])
async def test_a_client_who_leaves_leaves_nothing_behind(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "REPLAY_DELAY_S", 60.0 if phase == "before a replay" else 0.001)
    pipelines = {"queued": Queued, "taken": Taken}.get(phase, FakePipelines)(*[2] if "replay" in phase else [])
    pipelines.stall_after = {"tokens": {"0": 2}, "replayed": {"1": 2}}.get(phase, {})
    replayed = asyncio.Event()
    replicas = Replicas()
    replicas.set_running({"0", "1"})
    client = make_client(pipelines, replayed.set, replicas)

    async def read() -> None:
        async for _ in client.submit(REQUEST):
            pass

    reader = asyncio.create_task(read())
    await asyncio.wait_for((replayed if phase == "before a replay" else pipelines.stalled).wait(), 5)
    await asyncio.sleep(0.01)
    assert not reader.done()
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await asyncio.sleep(0)
    assert client._streams._attempts == {}
    assert client._calls._watchers == set()
    assert not any(client._streams._requests_at.values())
    assert len(pipelines.run.calls) == (2 if phase == "replayed" else 1)
    assert pipelines.run.calls[-1].is_cancelled


class Full(FakePipelines):
    """Each call goes where the router would send it; the replicas in `waits_s` refuse it with these queues."""

    def __init__(self, replicas: Replicas, **waits_s: float) -> None:
        super().__init__()
        self.replicas = replicas
        self.waits_s = waits_s
        self.asked: list[str] = []

    async def _run(
        self, _ingress: str, encoded: bytes, *, avoid: frozenset[str] = frozenset()
    ) -> AsyncGenerator[str | bytes]:
        replica_id = min(self.replicas.best(self.replicas.running - avoid))
        self.asked.append(replica_id)
        if (wait_s := self.waits_s.get(replica_id)) is not None:
            message = f"would wait for about {wait_s:g} s"
            yield msgspec.msgpack.encode(Overload(message, wait_s - 60.0, replica_id, wait_s))
            return
        request = msgspec.msgpack.decode(encoded, type=EngineRequest)
        self.attempts.append(request)
        outbox = self.outboxes.setdefault(replica_id, asyncio.Queue())
        yield replica_id
        for index in range(NUM_TOKENS):
            reason = FinishReason.LENGTH if index == NUM_TOKENS - 1 else None
            event = TokenEvent(request.request_id, index, 100 + index, -1.0, reason)
            outbox.put_nowait(msgspec.msgpack.encode([event]))
            await asyncio.sleep(0.001)


def ready(*replica_ids: str, clock: Callable[[], float] = time.monotonic) -> Replicas:
    replicas = Replicas(clock)
    replicas.set_running(replica_ids)
    return replicas


async def test_a_request_that_a_full_pipeline_refuses_goes_to_another() -> None:
    """At once, and first as any request does: it is neither replayed nor resumed. Later ones go there directly."""
    replicas = ready("a", "b")
    replicas.set_load("b", is_ready=True, queue_wait_s=20.0)  # of "a" nothing is known, so it is preferred
    pipelines = Full(replicas, a=90.0)
    replays: list[None] = []
    client = make_client(pipelines, lambda: replays.append(None), replicas, max_queue_wait_s=60.0)
    for _ in range(2):
        assert len([event async for event in client.submit(REQUEST)]) == NUM_TOKENS
    assert pipelines.asked == ["a", "b", "b"]
    assert replays == []


async def test_where_all_are_full_each_is_asked_once() -> None:
    """The refusal is the one of the shortest queue; nobody is asked in vain while that is known."""
    now = 0.0
    replicas = ready("a", "b", "c", clock=lambda: now)
    pipelines = Full(replicas, a=90.0, b=70.0, c=80.0)
    client = make_client(pipelines, replicas=replicas)  # knows no limit of its own

    async def refusal(client: ServeEngineClient, **changes: Any) -> OverloadedError:
        with pytest.raises(OverloadedError) as refusal:
            await anext(client.submit(msgspec.structs.replace(REQUEST, **changes)))
        return refusal.value

    error = await refusal(client)
    assert (str(error), error.retry_after_s) == ("would wait for about 70 s", 10.0)
    assert pipelines.asked == ["a", "b", "c"]
    client = make_client(pipelines, replicas=replicas, max_queue_wait_s=60.0)
    error = await refusal(client)
    assert ("about 70 s" in str(error), error.retry_after_s) == (True, 10.0)
    assert len(pipelines.asked) == 3
    await refusal(client, priority=-1)
    assert sorted(pipelines.asked[3:]) == ["a", "b", "c"]
    now = REFUSAL_COUNTS_S  # nobody is locked out by what was true a while ago
    pipelines.waits_s = {}
    assert len([event async for event in client.submit(REQUEST)]) == NUM_TOKENS


async def test_a_full_pipeline_whose_others_are_gone_or_not_ready_has_the_last_word() -> None:
    replicas = ready("a", "b")
    replicas.set_load("b", is_ready=False, queue_wait_s=0.0)
    pipelines = Full(replicas, a=90.0)
    with pytest.raises(OverloadedError, match="would wait for about 90 s") as refusal:
        await asyncio.wait_for(collect(pipelines, replicas=replicas), 10)
    assert refusal.value.retry_after_s == 30
    assert pipelines.asked == ["a"]


async def test_a_request_whose_last_candidate_leaves_on_the_way_is_refused() -> None:
    """Serve's router would keep it, with all that run to be avoided."""

    class Leaving(Full):
        async def _run(self, *args: Any, **kwargs: Any) -> AsyncGenerator[str | bytes]:
            if kwargs.get("avoid"):
                self.replicas.set_running({"a"})
                await asyncio.sleep(60)
            async for item in super()._run(*args, **kwargs):
                yield item

    pipelines = Leaving(replicas := ready("a", "b"), a=90.0)
    with pytest.raises(OverloadedError, match="would wait for about 90 s"):
        await asyncio.wait_for(collect(pipelines, replicas=replicas), 10)


async def test_where_all_queues_are_too_long_no_pipeline_is_asked() -> None:
    replicas = Replicas()
    replicas.set_running("ab")
    replicas.set_load("a", is_ready=True, queue_wait_s=90.0)

    async def attempt(**changes: Any) -> FakePipelines:
        pipelines = FakePipelines()
        client = make_client(pipelines, replicas=replicas, max_queue_wait_s=60.0)
        request = msgspec.structs.replace(REQUEST, **changes)
        assert len([event async for event in client.submit(request)]) == NUM_TOKENS
        return pipelines

    assert len((await attempt()).attempts) == 1  # of "b" nothing is known
    replicas.set_load("b", is_ready=True, queue_wait_s=70.0)
    with pytest.raises(OverloadedError, match="about 70 s") as refusal:
        await attempt()
    assert str(refusal.value) == "the request would wait for about 70 s, longer than the service's limit of 60 s"
    assert refusal.value.retry_after_s == 10
    await attempt(priority=-1)
    await attempt(is_admitted=True)
    replicas.set_load("b", is_ready=True, queue_wait_s=50.0)
    await attempt()
    with pytest.raises(OverloadedError, match=r"about 50 s, longer than the time of 2\.35 s that it has$") as refusal:
        await attempt(time_left_s=2.3456)
    assert refusal.value.retry_after_s == 50 - 2.3456
    replicas.forget("a")
    await attempt(time_left_s=2.0)


async def test_what_is_sent_again_is_not_refused_for_want_of_room() -> None:
    pipelines = FakePipelines(2, 0)
    await asyncio.wait_for(collect(pipelines), 10)
    assert [attempt.is_admitted for attempt in pipelines.attempts] == [False, True, True]


async def test_what_no_pipeline_took_is_not_resumed() -> None:
    """It may still be refused, and has only the rest of its time."""

    class Unreachable(FakePipelines):
        async def _run(self, _ingress: str, encoded: bytes) -> AsyncGenerator[str]:
            self.is_reachable = len(self.attempts) >= 2
            async for item in super()._run(_ingress, encoded):
                yield item

    pipelines = Unreachable(0, 0, 2)
    request = msgspec.structs.replace(REQUEST, time_left_s=0.15)
    assert len(await asyncio.wait_for(collect(pipelines, request), 10)) == NUM_TOKENS
    assert [attempt.is_admitted for attempt in pipelines.attempts] == [False, False, False, True]
    times_s = [attempt.time_left_s for attempt in pipelines.attempts[:3]]
    assert 0.1 < times_s[0] <= 0.15
    assert 0 < times_s[1] <= 0.15 - engine_client.REPLAY_DELAY_S
    assert times_s[2] == 0


class EndsFirst(FakePipelines):
    """One replica. The last event of request "early" comes before its call says who took it."""

    async def _run(self, _ingress: str, encoded: bytes) -> AsyncGenerator[str]:
        request = msgspec.msgpack.decode(encoded, type=EngineRequest)
        outbox = self.outboxes.setdefault("0", asyncio.Queue())
        end = msgspec.msgpack.encode([FailureEvent(request.request_id, "the end")])
        if request.request_id.startswith("early"):
            outbox.put_nowait(end)
            await asyncio.sleep(0.05)
            yield "0"
        else:
            yield "0"
            self.stalled.set()
            await self.goes_on.wait()
            outbox.put_nowait(end)


async def test_a_request_that_ends_before_it_is_known_to_be_taken_leaves_nothing_behind() -> None:
    """Else the event streams to its replica would be opened again and again."""
    client = make_client(pipelines := EndsFirst())
    other = asyncio.create_task(all_of(client.submit(REQUEST)))
    await asyncio.wait_for(pipelines.stalled.wait(), 5)
    early = client.submit(msgspec.structs.replace(REQUEST, request_id="early"))
    assert await all_of(early) == [FailureEvent("early-0", "the end")]
    await asyncio.sleep(0.1)
    assert client._streams._requests_at == {"0": {"r-0"}}
    pipelines.goes_on.set()
    assert await other == [FailureEvent("r-0", "the end")]
    assert not any(client._streams._requests_at.values())


class Preferred(Full):
    """Of what is not preferred the first one in the alphabet takes it. Each gives the tokens 100, 101, …"""

    def __init__(self, replicas: Replicas) -> None:
        super().__init__(replicas)
        self.preferred: list[str | None] = []

    async def _run(self, ingress: str, encoded: bytes, *, prefer: str | None = None) -> AsyncGenerator[str | bytes]:
        self.preferred.append(prefer)
        others = self.replicas.running - {prefer}
        async for item in super()._run(ingress, encoded, avoid=frozenset(others if prefer else ())):
            yield item


async def test_a_conversation_goes_on_where_it_is_cached() -> None:
    """Prompt and answer are known to be there; what moves to another pipeline is known there as well."""
    prompt = list(range(40))
    pipelines = Preferred(replicas := ready("a", "b"))
    routes: list[RoutedBy] = []
    client = make_client(pipelines, replicas=replicas, on_route=routes.append)

    async def ask(prompt: list[int]) -> None:
        events = client.submit(msgspec.structs.replace(REQUEST, prompt_token_ids=prompt))
        assert [event.token_id async for event in events] == [100 + index for index in range(NUM_TOKENS)]

    await ask(prompt)
    await ask([*prompt, *[100 + index for index in range(NUM_TOKENS)], 1, 2, 3])
    replicas.set_running({"b", "c"})
    await ask(prompt)
    replicas.set_running({"a", "b", "c"})
    await ask(prompt)
    assert pipelines.preferred == [None, "a", None, "b"]
    assert pipelines.asked == ["a", "a", "b", "b"]
    by = {None: RoutedBy.LOAD, "a": RoutedBy.PREFIX, "b": RoutedBy.PREFIX}
    assert routes == [by[preferred] for preferred in pipelines.preferred]


@pytest.mark.parametrize(
    "told",
    [
        [msgspec.msgpack.encode([LoadEvent(False)]), msgspec.msgpack.encode([LoadEvent(True)])],
        [msgspec.msgpack.encode([LoadEvent(False), LoadEvent(True)])],
        [ActorUnavailableError("gone", None)],
    ],
    ids=["its stage is lost and back", "both at once", "it does not answer"],
)
async def test_a_pipeline_that_lost_its_blocks_is_not_preferred_for_them(told: list[bytes | Exception]) -> None:
    """Though nothing was routed before it was ready again."""
    pipelines = Preferred(replicas := ready("a", "b"))
    client = make_client(pipelines, replicas=replicas)
    request = msgspec.structs.replace(REQUEST, prompt_token_ids=list(range(40)))
    for _ in range(2):
        assert len(await all_of(client.submit(request))) == NUM_TOKENS
    for item in told:
        pipelines.outboxes["a"].put_nowait(item)
    await asyncio.sleep(0.05)
    assert replicas.recovering == set()
    assert len(await all_of(client.submit(request))) == NUM_TOKENS
    assert pipelines.preferred == [None, "a", None]


async def test_a_session_stays_until_its_pipeline_leaves() -> None:
    """By two ingresses, which know nothing of each other."""
    replicas = ready("a", "b", "c")
    ingresses = [Preferred(replicas) for _ in range(2)]
    clients = [make_client(pipelines, replicas=replicas) for pipelines in ingresses]

    async def asked() -> set[str]:
        """Where it goes now."""
        for client, pipelines in zip(clients, ingresses, strict=True):
            pipelines.asked.clear()
            in_session = msgspec.structs.replace(REQUEST, session_id="user-7")
            for _ in range(2):
                assert len(await all_of(client.submit(in_session))) == NUM_TOKENS
        return {*ingresses[0].asked, *ingresses[1].asked}

    (own,) = await asked()
    replicas.set_running({"a", "b", "c"} - {own})
    (second,) = await asked()
    assert second != own
    replicas.set_running({"a", "b", "c"})
    assert await asked() == {own}
