"""A pipeline that has come, or was idle, gets its part of the requests that wait elsewhere; no cluster."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest

from gptj_serve.serving.engine_client import ServeEngineClient
from gptj_serve.serving.replicas import SAME_WAIT_S, Replicas
from gptj_serve.types import EngineRequest, FinishReason, LoadEvent, ModelVersion, SamplingParams, Task, TokenEvent
from tests.serving.test_engine_client import Method

NUM_TOKENS = 3
VERSION, OTHER = ModelVersion("text", "numbers"), ModelVersion("text", "other numbers")


class Pipelines:
    """ "old" begins with some requests and lets the others wait; any other replica answers at once."""

    def __init__(self, queue_wait_s: float = 20.0, new: ModelVersion = VERSION, begun: tuple[str, ...] = ()) -> None:
        self.replicas = Replicas()
        self.replicas.set_running({"old"})
        self.queue_wait_s = queue_wait_s
        self.begun = begun
        self.versions = defaultdict(lambda: new, old=VERSION)
        self.taken: defaultdict[str, list[EngineRequest]] = defaultdict(list)
        self.goes_on = asyncio.Event()
        self._outboxes: defaultdict[str, asyncio.Queue[bytes]] = defaultdict(asyncio.Queue)
        self.run, self.events = Method(self._run), Method(self._events)

    def options(self, **_: Any) -> "Pipelines":
        return self

    async def _run(
        self, _ingress: str, encoded: bytes, *, avoid: frozenset[str] = frozenset()
    ) -> AsyncGenerator[str | bytes]:
        request = msgspec.msgpack.decode(encoded, type=EngineRequest)
        replica_id = min(self.replicas.best(self.replicas.running - avoid))
        self.taken[replica_id].append(request)
        yield replica_id
        for index in range(NUM_TOKENS):
            if replica_id == "old" and (index > 0 or request.request_id.split("-")[0] not in self.begun):
                await self.goes_on.wait()
            reason = FinishReason.LENGTH if index == NUM_TOKENS - 1 else None
            self._tell(replica_id, TokenEvent(request.request_id, index, 100 + index, -1.0, reason))

    async def _events(self, _ingress: str, *, replica_id: str) -> AsyncGenerator[bytes]:
        wait_s = self.queue_wait_s if replica_id == "old" else 0.0
        yield msgspec.msgpack.encode([LoadEvent(True, wait_s, self.versions[replica_id])])
        while True:
            yield await self._outboxes[replica_id].get()

    def _tell(self, replica_id: str, event: TokenEvent) -> None:
        self._outboxes[replica_id].put_nowait(msgspec.msgpack.encode([event]))

    def names(self, replica_id: str) -> list[str]:
        return [request.request_id.split("-")[0] for request in self.taken[replica_id]]


async def run(pipelines: Pipelines, num_requests: int, *arriving: str) -> dict[str, list[str]]:
    """Which replica was sent which requests, with these arriving while all are with the old one; all are answered."""
    client = ServeEngineClient(
        pipelines,  # type: ignore[arg-type]
        replicas=pipelines.replicas,
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
    pipelines.goes_on.set()
    assert await asyncio.wait_for(asyncio.gather(*answers), 10) == [[100, 101, 102]] * num_requests
    return {replica_id: pipelines.names(replica_id) for replica_id in sorted(pipelines.taken)}


async def test_a_new_pipeline_gets_the_last_half_of_what_waits() -> None:
    pipelines = Pipelines()
    sent = await run(pipelines, 7, "new")
    assert sent == {"new": ["r4", "r5", "r6"], "old": [f"r{index}" for index in range(7)]}
    assert [request.is_admitted for request in pipelines.taken["new"]] == [True] * 3, "it has been let in before"


async def test_what_has_begun_stays() -> None:
    pipelines = Pipelines(begun=("r0", "r1", "r6"))
    assert (await run(pipelines, 7, "new"))["new"] == ["r4", "r5"]


@pytest.mark.parametrize("pipelines_like", [{"queue_wait_s": SAME_WAIT_S}, {"new": OTHER, "begun": ("r0",)}])
async def test_nothing_moves_without_need_or_into_another_version(pipelines_like: dict[str, Any]) -> None:
    """Parts of one answer are of one version."""
    pipelines = Pipelines(**pipelines_like)
    assert set(await run(pipelines, 6, "new")) == {"old"}
