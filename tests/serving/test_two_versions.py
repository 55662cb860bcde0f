"""`ServeEngineClient` while pipelines of two versions run side by side; no cluster."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from gptj_serve.api.request_context import RequestContext
from gptj_serve.errors import OverloadedError
from gptj_serve.routing.choice import PipelineChoice
from gptj_serve.serving import event_streams
from gptj_serve.serving.engine_client import ServeEngineClient
from gptj_serve.serving.replicas import Replicas
from gptj_serve.types import (
    EngineRequest,
    FinishReason,
    LoadEvent,
    ModelVersion,
    OtherVersion,
    Overload,
    SamplingParams,
    Task,
    TokenEvent,
)
from tests.serving.service import eventually
from tests.serving.test_engine_client import Method

NUM_TOKENS = 6
REQUEST = EngineRequest(
    request_id="r-1", task=Task.GENERATE, prompt_token_ids=[1], sampling=SamplingParams(max_new_tokens=NUM_TOKENS)
)
OLD, NEW = ModelVersion("text", "old"), ModelVersion("text", "new")
FIRST_TOKEN = {OLD: 100, NEW: 200}


class Pipelines:
    """Of known versions. Each call goes to the first running one that it need not avoid; "a" stalls after 2 tokens."""

    def __init__(self, replicas: Replicas, **versions: ModelVersion) -> None:
        self.replicas = replicas
        self.versions = versions
        self.asked: list[str] = []
        self.attempts: list[EngineRequest] = []
        self.full: set[str] = set()
        self.idle: set[str] = set()  # their event streams end
        self.num_streams: Counter[str] = Counter()  # by replica
        self.num_failing_streams = 0  # of each replica, the first
        self.stalled, self.goes_on, self.dies = asyncio.Event(), asyncio.Event(), False
        self._outboxes: dict[str, asyncio.Queue[bytes | Exception]] = {name: asyncio.Queue() for name in versions}
        self.run, self.events = Method(self._run), Method(self._events)

    def options(self, **_: Any) -> "Pipelines":
        return self

    async def _run(
        self, _ingress: str, encoded: bytes, *, avoid: frozenset[str] = frozenset()
    ) -> AsyncGenerator[str | bytes]:
        request = msgspec.msgpack.decode(encoded, type=EngineRequest)
        replica_id = min(self.replicas.running - avoid)
        self.asked.append(replica_id)
        self.attempts.append(request)
        version = self.versions[replica_id]
        if request.text_version != version.text or request.numbers_version not in ("", version.numbers):
            yield msgspec.msgpack.encode(OtherVersion(replica_id, version))
            return
        if replica_id in self.full and not request.is_admitted:
            yield msgspec.msgpack.encode(Overload("too full", 30.0, replica_id, 90.0))
            return
        yield replica_id
        for index in range(len(request.output_token_ids), NUM_TOKENS):
            if replica_id == "a" and index == 2:
                self.stalled.set()
                await self.goes_on.wait()
                if self.dies:
                    raise ActorDiedError
            reason = FinishReason.LENGTH if index == NUM_TOKENS - 1 else None
            event = TokenEvent(request.request_id, index, FIRST_TOKEN[version] + index, -1.0, reason)
            self._outboxes[replica_id].put_nowait(msgspec.msgpack.encode([event]))
            await asyncio.sleep(0.001)

    async def _events(self, _ingress: str, *, replica_id: str) -> AsyncGenerator[bytes]:
        self.num_streams[replica_id] += 1
        if self.num_streams[replica_id] <= self.num_failing_streams:
            raise ActorUnavailableError("not now", None)
        yield msgspec.msgpack.encode([LoadEvent(True, 0.0, self.versions[replica_id])])
        while replica_id not in self.idle:
            item = await self._outboxes[replica_id].get()
            assert isinstance(item, bytes)
            yield item


def named(request_id: str, **changes: Any) -> EngineRequest:
    return msgspec.structs.replace(REQUEST, request_id=request_id, **changes)


def make_client(pipelines: Pipelines) -> ServeEngineClient:
    return ServeEngineClient(
        pipelines,  # type: ignore[arg-type]
        replicas=pipelines.replicas,
        choice=PipelineChoice(16, 1024),
        replay_timeout_s=60.0,
        text_version="text",
    )


async def token_ids(
    pipelines: Pipelines, request: EngineRequest = REQUEST, client: ServeEngineClient | None = None
) -> list[int]:
    client = client or make_client(pipelines)
    return [event.token_id async for event in client.submit(request) if isinstance(event, TokenEvent)]


def tokens_of(version: ModelVersion) -> list[int]:
    return [FIRST_TOKEN[version] + index for index in range(NUM_TOKENS)]


async def replaced(**successors: ModelVersion) -> tuple[Pipelines, asyncio.Task[list[int]]]:
    """A request has two tokens of "a", which is then stopped; `successors` run instead."""
    pipelines = Pipelines(Replicas(), a=OLD, **successors)
    pipelines.replicas.set_running({"a"})
    answer = asyncio.create_task(token_ids(pipelines))
    await asyncio.wait_for(pipelines.stalled.wait(), 5)
    pipelines.replicas.set_running(successors)
    await asyncio.sleep(0.05)
    return pipelines, answer


async def test_what_another_pipeline_can_go_on_with_leaves_at_once() -> None:
    pipelines, answer = await replaced(b=OLD)
    assert await asyncio.wait_for(answer, 5) == tokens_of(OLD)
    assert pipelines.asked == ["a", "b"]


async def test_what_none_can_go_on_with_is_finished_where_it_began() -> None:
    pipelines, answer = await replaced(b=NEW)
    pipelines.goes_on.set()
    assert await asyncio.wait_for(answer, 5) == tokens_of(OLD)
    assert pipelines.asked == ["a"]


async def test_an_answer_whose_version_is_gone_ends_with_an_error() -> None:
    """And never goes on with tokens of another."""
    pipelines, answer = await replaced(b=NEW)
    pipelines.dies = True
    pipelines.goes_on.set()
    with pytest.raises(OverloadedError, match="replaced by another version before the request was answered"):
        await asyncio.wait_for(answer, 5)


async def test_a_request_that_a_pipeline_of_another_text_gets_goes_on_to_one_that_understands_it() -> None:
    pipelines = Pipelines(Replicas(), b=ModelVersion("other text", "new"), c=NEW)
    pipelines.replicas.set_running({"b", "c"})
    assert await asyncio.wait_for(token_ids(pipelines), 5) == tokens_of(NEW)
    assert pipelines.asked == ["b", "c"]


async def test_a_request_that_only_the_other_version_refused_is_not_resumed() -> None:
    """The next pipeline may refuse it for want of room, and the one after that takes it."""
    pipelines = Pipelines(Replicas(), b=ModelVersion("other text", "new"), c=NEW, d=NEW)
    pipelines.replicas.set_running({"b", "c", "d"})
    pipelines.full = {"c"}
    request = named("r-1", time_left_s=30.0)
    assert await asyncio.wait_for(token_ids(pipelines, request), 5) == tokens_of(NEW)
    assert pipelines.asked == ["b", "c", "d"]
    assert [attempt.is_admitted for attempt in pipelines.attempts] == [False, False, False]
    assert pipelines.attempts[2].time_left_s < pipelines.attempts[0].time_left_s < 30


async def test_where_only_a_full_pipeline_understands_a_request_its_refusal_counts() -> None:
    pipelines = Pipelines(Replicas(), b=NEW, c=ModelVersion("other text", "new"))
    pipelines.replicas.set_running({"b", "c"})
    pipelines.full = {"b"}
    with pytest.raises(OverloadedError, match="too full"):
        await asyncio.wait_for(token_ids(pipelines), 5)
    assert pipelines.asked == ["b", "c"]


async def test_new_requests_take_any_version() -> None:
    pipelines = Pipelines(Replicas(), b=NEW, c=OLD)
    pipelines.replicas.set_running({"b", "c"})
    assert await asyncio.wait_for(token_ids(pipelines), 5) == tokens_of(NEW)
    assert pipelines.asked == ["b"]


async def test_a_new_ingress_waits_for_the_pipelines_that_come_with_it() -> None:
    """It may be asked before it hears of them, while those of the old version still run."""
    pipelines = Pipelines(Replicas(), a=OLD, b=NEW)
    pipelines.replicas.set_running({"a"})
    pipelines.replicas.set_version("a", ModelVersion("another text", OLD.numbers))
    answer = asyncio.create_task(token_ids(pipelines))
    await asyncio.sleep(0.2)
    assert not answer.done()
    assert pipelines.asked == []
    pipelines.replicas.set_running({"a", "b"})
    pipelines.replicas.set_version("b", NEW)
    assert await asyncio.wait_for(answer, 5) == tokens_of(NEW)
    assert pipelines.asked == ["b"]


async def test_requests_of_one_id_are_different_answers() -> None:
    """Clients choose the ids of their requests; the sequences of one answer belong together all the same."""
    pipelines = Pipelines(Replicas(), a=OLD, b=NEW)
    pipelines.replicas.set_running({"a"})
    client = make_client(pipelines)
    first, second = RequestContext(request_id="mine"), RequestContext(request_id="mine")

    async def ask(request: RequestContext) -> list[int]:
        return await token_ids(pipelines, named(request.new_sequence_id()), client)

    begun = asyncio.create_task(ask(first))
    await asyncio.wait_for(pipelines.stalled.wait(), 5)
    pipelines.replicas.set_version("b", NEW)
    pipelines.replicas.set_running({"b"})
    assert await asyncio.wait_for(ask(second), 5) == tokens_of(NEW)
    with pytest.raises(OverloadedError, match="replaced by another version"):
        await asyncio.wait_for(ask(first), 5)
    pipelines.goes_on.set()
    assert await asyncio.wait_for(begun, 5) == tokens_of(OLD)


@pytest.mark.parametrize("num_failing_streams", [0, 1])
async def test_replicas_that_came_before_the_first_request_are_asked_for_their_version(
    num_failing_streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its tokens can move to one of them; and again where the answer did not come."""
    monkeypatch.setattr(event_streams, "VERSION_RETRY_S", 0.01)
    pipelines = Pipelines(Replicas(), b=OLD, c=NEW)
    pipelines.num_failing_streams = num_failing_streams
    pipelines.replicas.set_running({"b", "c"})
    client = make_client(pipelines)
    assert await asyncio.wait_for(token_ids(pipelines, client=client), 5) == tokens_of(OLD)

    async def are_known() -> bool:
        """both versions are known"""
        return [pipelines.replicas.version(replica_id) for replica_id in "bc"] == [OLD, NEW]

    await eventually(are_known, 5)
    await asyncio.sleep(0.05)
    assert pipelines.num_streams["c"] == num_failing_streams + 1


@pytest.mark.parametrize("is_idle", [True, False])
async def test_versions_of_replicas_that_have_left_are_forgotten(is_idle: bool) -> None:
    """Whether or not an event stream was still open there."""
    pipelines = Pipelines(Replicas(), b=OLD, c=NEW)
    pipelines.idle = {"c"} if is_idle else set()
    pipelines.replicas.set_running({"b", "c"})
    client = make_client(pipelines)
    assert await asyncio.wait_for(token_ids(pipelines, client=client), 5) == tokens_of(OLD)
    await asyncio.sleep(0.05)
    assert pipelines.replicas.version("c") == NEW
    pipelines.replicas.set_running({"b"})
    await asyncio.sleep(0.05)
    assert [pipelines.replicas.version(replica_id) for replica_id in "bc"] == [OLD, None]
