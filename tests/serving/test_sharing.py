"""A pipeline at which nothing waits gets its part of the requests that wait elsewhere; no cluster."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest

from gptj_serve.routing.choice import PipelineChoice
from gptj_serve.serving.engine_client import ServeEngineClient
from gptj_serve.serving.replicas import SAME_WAIT_S, Replicas
from gptj_serve.types import (
    EngineRequest,
    FinishReason,
    LoadEvent,
    ModelVersion,
    Overload,
    SamplingParams,
    Task,
    TokenEvent,
)
from tests.serving.test_engine_client import Method

NUM_TOKENS = 3
VERSION, OTHER = ModelVersion("text", "numbers"), ModelVersion("text", "other numbers")


class Pipelines:
    """Replica "old" begins with some requests and lets the others wait; any other answers at once."""

    def __init__(
        self,
        queue_wait_s: float = 20.0,
        new: ModelVersion = VERSION,
        begun: tuple[str, ...] = (),
        computing: tuple[str, ...] = (),
    ) -> None:
        self.replicas = Replicas()
        self.replicas.set_running({"old"})
        self.queue_wait_s = queue_wait_s  # of the old one while something waits there
        self.begun = begun  # by the old one, with a first token
        self.computing = computing  # by the old one, without one so far
        self.versions = defaultdict(lambda: new, old=VERSION)
        self.sent: defaultdict[str, list[EngineRequest]] = defaultdict(list)
        self.waiting: defaultdict[str, list[str]] = defaultdict(list)
        self.goes_on = asyncio.Event()
        self.absent: set[str] = set()  # replicas that take nothing before all goes on
        self.mute: set[str] = set()  # replicas that do not begin before all goes on
        self.stalls: set[str] = set()  # replicas that begin with what they get, and go on with it later
        self.full: set[str] = set()  # replicas that take only what has been let in before
        self._outboxes: defaultdict[str, asyncio.Queue[bytes]] = defaultdict(asyncio.Queue)
        self.run, self.events = Method(self._run), Method(self._events)

    def options(self, **_: Any) -> "Pipelines":
        return self

    async def _run(
        self, _ingress: str, encoded: bytes, *, avoid: frozenset[str] = frozenset(), prefer: str = ""
    ) -> AsyncGenerator[str | bytes]:
        request = msgspec.msgpack.decode(encoded, type=EngineRequest)
        best = self.replicas.best(self.replicas.running - avoid)
        replica_id = prefer if prefer in best else max(best)
        self.sent[replica_id].append(request)
        if replica_id in self.full and not request.is_admitted:
            yield msgspec.msgpack.encode(Overload("too full", 30.0, replica_id, 90.0))
            return
        if replica_id in self.absent:
            await self.goes_on.wait()
        waiting = self.waiting[replica_id]
        waiting.append(request.request_id)
        try:
            yield replica_id
            for index in range(NUM_TOKENS):
                await self._turn(replica_id, request.request_id, index)
                if request.request_id in waiting:
                    waiting.remove(request.request_id)
                reason = FinishReason.LENGTH if index == NUM_TOKENS - 1 else None
                self._put(replica_id, TokenEvent(request.request_id, index, 100 + index, -1.0, reason))
        finally:
            if request.request_id in waiting:
                waiting.remove(request.request_id)

    async def _turn(self, replica_id: str, request_id: str, index: int) -> None:
        name = request_id.split("-")[0]
        if replica_id == "old" and name in self.computing and index == 0:
            self.waiting["old"].remove(request_id)
        waits = replica_id in self.mute or (replica_id == "old" and name not in self.begun)
        if waits or (index > 0 and replica_id in {"old", *self.stalls}):
            await self.goes_on.wait()

    async def _events(self, _ingress: str, *, replica_id: str) -> AsyncGenerator[bytes]:
        yield msgspec.msgpack.encode([self._load(replica_id, self.versions[replica_id])])
        while True:
            yield await self._outboxes[replica_id].get()

    def _load(self, replica_id: str, version: ModelVersion | None = None) -> LoadEvent:
        waiting = tuple(self.waiting[replica_id])
        wait_s = self.queue_wait_s if replica_id == "old" and waiting else 0.0
        return LoadEvent(True, wait_s, version, 0, len(waiting), waiting)

    def _put(self, replica_id: str, event: TokenEvent | LoadEvent) -> None:
        self._outboxes[replica_id].put_nowait(msgspec.msgpack.encode([event]))

    async def tell(self, *replica_ids: str) -> None:
        """How long their queues are, one after the other."""
        for replica_id in replica_ids:
            self._put(replica_id, self._load(replica_id))
            await asyncio.sleep(0.02)

    def names(self, replica_id: str) -> list[str]:
        return [request.request_id.split("-")[0] for request in self.sent[replica_id]]


class Ingress:
    """Sends requests "r0", "r1", …"""

    def __init__(self, pipelines: Pipelines) -> None:
        self.client = ServeEngineClient(
            pipelines,  # type: ignore[arg-type]
            replicas=pipelines.replicas,
            choice=PipelineChoice(16, 1024),
            replay_timeout_s=60.0,
            text_version="text",
        )
        self.pipelines = pipelines
        self.answers: list[asyncio.Task[list[int]]] = []

    async def send(self, num_requests: int) -> None:
        """All are taken by the old one."""
        for index in range(num_requests):
            self.answers.append(asyncio.create_task(self._answer(f"r{index}")))
            await asyncio.sleep(0)
        replicas = self.pipelines.replicas
        while len(self.pipelines.sent["old"]) < num_requests or not all(map(replicas.version, replicas.running)):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)

    async def _answer(self, name: str) -> list[int]:
        sampling = SamplingParams(max_new_tokens=NUM_TOKENS)
        request = EngineRequest(request_id=f"{name}-1", task=Task.GENERATE, prompt_token_ids=[1], sampling=sampling)
        return [event.token_id async for event in self.client.submit(request) if isinstance(event, TokenEvent)]

    async def end(self) -> dict[str, list[str]]:
        """Which replica was sent which requests, after all are answered."""
        self.pipelines.goes_on.set()
        answers = await asyncio.wait_for(asyncio.gather(*self.answers), 10)
        assert answers == [[100, 101, 102]] * len(self.answers)
        return {replica_id: self.pipelines.names(replica_id) for replica_id in sorted(self.pipelines.sent)}


async def run(pipelines: Pipelines, num_requests: int, *arriving: str, num_more: int = 0) -> dict[str, list[str]]:
    """Which replica was sent which requests, with these arriving while all are with the old one.

    So often these and the old one tell of their load, beside the first time.
    """
    ingress = Ingress(pipelines)
    await ingress.send(num_requests)
    running = {"old"}
    for replica_id in arriving:
        pipelines.replicas.set_running(running := running | {replica_id})
        while pipelines.replicas.version(replica_id) is None:
            await asyncio.sleep(0.001)
        await pipelines.tell("old")
        for _ in range(num_more):
            await pipelines.tell(replica_id, "old")
    return await ingress.end()


async def test_a_new_pipeline_gets_the_last_half_of_what_waits() -> None:
    pipelines = Pipelines()
    sent = await run(pipelines, 7, "new")
    assert sent == {"new": ["r4", "r5", "r6"], "old": [f"r{index}" for index in range(7)]}
    assert [request.is_admitted for request in pipelines.sent["new"]] == [True] * 3, "it has been let in before"


async def test_one_that_has_begun_with_all_it_has_gets_more() -> None:
    pipelines = Pipelines()
    pipelines.stalls = {"new"}
    assert (await run(pipelines, 9, "new", num_more=1))["new"] == ["r5", "r6", "r7", "r8", "r3", "r4"]


async def test_one_at_which_something_waits_gets_no_more() -> None:
    """It may not know yet how long its queue lasts."""
    pipelines = Pipelines()
    pipelines.mute = {"new"}
    assert (await run(pipelines, 9, "new", num_more=3))["new"] == ["r5", "r6", "r7", "r8"]


async def test_nothing_more_moves_before_what_moved_has_been_taken() -> None:
    pipelines = Pipelines()
    pipelines.absent = {"new"}
    assert (await run(pipelines, 9, "new", num_more=3))["new"] == ["r5", "r6", "r7", "r8"]


@pytest.mark.parametrize("state", ["absent", "mute"])
async def test_nothing_more_moves_before_what_moved_is_counted(state: str) -> None:
    """What the new one has told counts only until it takes something."""
    pipelines = Pipelines()
    ingress = Ingress(pipelines)
    await ingress.send(8)
    pipelines.replicas.set_running({"old", "new"})
    while pipelines.replicas.version("new") is None:
        await asyncio.sleep(0.001)
    setattr(pipelines, state, {"new"})
    await pipelines.tell("old", "old", "old")
    assert (await ingress.end())["new"] == ["r4", "r5", "r6", "r7"]


async def test_several_that_come_share_alike() -> None:
    pipelines = Pipelines()
    pipelines.stalls = {"b"}
    assert {name: len(sent) for name, sent in (await run(pipelines, 8, "b", "c")).items()} == {"b": 4, "c": 2, "old": 8}


async def test_what_does_not_wait_stays() -> None:
    """It has begun, though of some nothing has come yet: a beam search, or a long prompt."""
    pipelines = Pipelines(begun=("r0", "r1", "r6"), computing=("r4", "r5"))
    assert (await run(pipelines, 9, "new"))["new"] == ["r7", "r8"]


async def test_what_was_refused_elsewhere_may_move_there_later() -> None:
    """And does not come back to the end of the queue that it was in."""
    pipelines = Pipelines()
    pipelines.replicas.set_running({"old", "z"})
    pipelines.full = {"z"}
    ingress = Ingress(pipelines)
    await ingress.send(2)
    refused, in_line = pipelines.names("z"), pipelines.names("old")
    assert in_line[-1] in refused
    await pipelines.tell("z", "old")
    assert await ingress.end() == {"old": in_line, "z": [*refused, in_line[-1]]}


@pytest.mark.parametrize("pipelines_like", [{"queue_wait_s": SAME_WAIT_S}, {"new": OTHER, "begun": ("r0",)}])
async def test_nothing_moves_without_need_or_into_another_version(pipelines_like: dict[str, Any]) -> None:
    """Parts of one answer are of one version."""
    pipelines = Pipelines(**pipelines_like)
    assert set(await run(pipelines, 6, "new")) == {"old"}
