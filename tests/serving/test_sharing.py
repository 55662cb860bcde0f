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
from gptj_serve.types import EngineRequest, FinishReason, LoadEvent, ModelVersion, SamplingParams, Task, TokenEvent
from tests.serving.test_engine_client import Method

NUM_TOKENS = 3
VERSION, OTHER = ModelVersion("text", "numbers"), ModelVersion("text", "other numbers")


class Pipelines:
    """Replica "old" begins with some requests and lets the others wait; any other answers at once."""

    def __init__(self, queue_wait_s: float = 20.0, new: ModelVersion = VERSION, begun: tuple[str, ...] = ()) -> None:
        self.replicas = Replicas()
        self.replicas.set_running({"old"})
        self.queue_wait_s = queue_wait_s
        self.begun = begun
        self.versions = defaultdict(lambda: new, old=VERSION)
        self.taken: defaultdict[str, list[EngineRequest]] = defaultdict(list)
        self.goes_on = asyncio.Event()
        self.mute: set[str] = set()  # replicas that do not begin before all goes on
        self.stalls: set[str] = set()  # replicas that begin with what they get, and go on with it later
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
        self.taken[replica_id].append(request)
        yield replica_id
        for index in range(NUM_TOKENS):
            waits = replica_id in self.mute or (
                replica_id == "old" and request.request_id.split("-")[0] not in self.begun
            )
            if waits or (index > 0 and replica_id in {"old", *self.stalls}):
                await self.goes_on.wait()
            reason = FinishReason.LENGTH if index == NUM_TOKENS - 1 else None
            self._tell(replica_id, TokenEvent(request.request_id, index, 100 + index, -1.0, reason))

    async def _events(self, _ingress: str, *, replica_id: str) -> AsyncGenerator[bytes]:
        wait_s = self.queue_wait_s if replica_id == "old" else 0.0
        yield msgspec.msgpack.encode([LoadEvent(True, wait_s, self.versions[replica_id])])
        while True:
            yield await self._outboxes[replica_id].get()

    def _tell(self, replica_id: str, event: TokenEvent | LoadEvent) -> None:
        self._outboxes[replica_id].put_nowait(msgspec.msgpack.encode([event]))

    def has_no_queue(self, replica_id: str) -> None:
        self._tell(replica_id, LoadEvent(True, 0.0))

    def names(self, replica_id: str) -> list[str]:
        return [request.request_id.split("-")[0] for request in self.taken[replica_id]]


async def run(
    pipelines: Pipelines, num_requests: int, *arriving: str, num_load_events: int = 0
) -> dict[str, list[str]]:
    """Which replica was sent which requests, with these arriving while all are with the old one; all are answered.

    So often each of these tells of its load, beside the first time.
    """
    client = ServeEngineClient(
        pipelines,  # type: ignore[arg-type]
        replicas=pipelines.replicas,
        choice=PipelineChoice(16, 1024),
        replay_timeout_s=60.0,
        text_version="text",
    )

    async def answer(name: str) -> list[int]:
        sampling = SamplingParams(max_new_tokens=NUM_TOKENS)
        request = EngineRequest(request_id=f"{name}-1", task=Task.GENERATE, prompt_token_ids=[1], sampling=sampling)
        return [event.token_id async for event in client.submit(request) if isinstance(event, TokenEvent)]

    answers = []
    for index in range(num_requests):
        answers.append(asyncio.create_task(answer(f"r{index}")))
        await asyncio.sleep(0)
    while len(pipelines.taken["old"]) < num_requests or pipelines.replicas.version("old") is None:
        await asyncio.sleep(0.001)
    running = {"old"}
    for replica_id in arriving:
        pipelines.replicas.set_running(running := running | {replica_id})
        while pipelines.replicas.version(replica_id) is None:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        for _ in range(num_load_events):
            pipelines.has_no_queue(replica_id)
            await asyncio.sleep(0.02)
    pipelines.goes_on.set()
    assert await asyncio.wait_for(asyncio.gather(*answers), 10) == [[100, 101, 102]] * num_requests
    return {replica_id: pipelines.names(replica_id) for replica_id in sorted(pipelines.taken)}


async def test_a_new_pipeline_gets_the_last_half_of_what_waits() -> None:
    pipelines = Pipelines()
    sent = await run(pipelines, 7, "new")
    assert sent == {"new": ["r4", "r5", "r6"], "old": [f"r{index}" for index in range(7)]}
    assert [request.is_admitted for request in pipelines.taken["new"]] == [True] * 3, "it has been let in before"


async def test_one_that_has_begun_with_all_it_has_gets_more() -> None:
    pipelines = Pipelines()
    pipelines.stalls = {"new"}
    assert (await run(pipelines, 9, "new", num_load_events=1))["new"] == ["r5", "r6", "r7", "r8", "r3", "r4"]


async def test_one_at_which_something_waits_gets_no_more() -> None:
    """It may not know yet how long its queue lasts."""
    pipelines = Pipelines()
    pipelines.mute = {"new"}
    assert (await run(pipelines, 9, "new", num_load_events=3))["new"] == ["r5", "r6", "r7", "r8"]


async def test_several_that_come_share_alike() -> None:
    pipelines = Pipelines()
    pipelines.stalls = {"b"}
    assert {name: len(sent) for name, sent in (await run(pipelines, 8, "b", "c")).items()} == {"b": 4, "c": 2, "old": 8}


async def test_what_has_begun_stays() -> None:
    pipelines = Pipelines(begun=("r0", "r1", "r6"))
    assert (await run(pipelines, 7, "new"))["new"] == ["r4", "r5"]


@pytest.mark.parametrize("pipelines_like", [{"queue_wait_s": SAME_WAIT_S}, {"new": OTHER, "begun": ("r0",)}])
async def test_nothing_moves_without_need_or_into_another_version(pipelines_like: dict[str, Any]) -> None:
    """Parts of one answer are of one version."""
    pipelines = Pipelines(**pipelines_like)
    assert set(await run(pipelines, 6, "new")) == {"old"}
