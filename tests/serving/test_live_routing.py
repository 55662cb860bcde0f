"""Two pipelines, and who is sent where: sessions stay, conversations find their cache, and both survive a pipeline."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from gptj_serve.api.service_status import CACHE_S
from tests.chaos.deployment import chaos_config
from tests.chaos.faults import Processes, Role
from tests.serving.service import ServeRun, eventually

pytestmark = [pytest.mark.serve, pytest.mark.faults]

PORT = 8014
BLOCK_SIZE = 16
NUM_NEW = 20
PIPELINE = {"num_stages": 1, "stage": {"num_cpus": 0.2}, "engine_num_cpus": 0.05}
INGRESS = {"num_replicas": 1, "num_cpus": 0.05}


class Client:
    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def complete(self, prompt: list[int], session_id: str = "") -> list[int]:
        """The next token ids."""
        body = {"prompt": prompt, "max_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        headers = {"X-Session-Id": session_id} if session_id else {}
        response = await self._http.post("/v1/completions", json={"model": "gptj-demo", **body}, headers=headers)
        assert response.status_code == 200, response.text
        token_ids: list[int] = response.json()["choices"][0]["token_ids"]
        assert len(token_ids) == NUM_NEW
        return token_ids

    async def counted(self, name: str) -> Counter[str]:
        """What each pipeline's engine counts, by replica id."""
        await asyncio.sleep(CACHE_S + 0.1)
        status = (await self._http.get("/status")).json()
        return Counter({pipeline["replica_id"]: pipeline["engine"][name] for pipeline in status["pipelines"]})

    async def home(self, session_id: str) -> str:
        """The one pipeline that takes its requests, whatever they ask."""
        before = await self.counted("num_requests_finished")
        for number in range(4):
            await self.complete([number + 1] * 5, session_id)
        ((home, num_requests),) = (await self.counted("num_requests_finished") - before).items()
        assert num_requests == 4
        return home


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[ServeRun]:
    """In a cluster of its own beside the other tests' service."""
    config = chaos_config(tmp_path, PORT, pipeline=PIPELINE, ingress=INGRESS)
    run = ServeRun(config, tmp_path / "output.log", PORT)
    try:
        yield run.wait_until_ready()
    finally:
        run.interrupt()


@pytest.mark.timeout(180)
async def test_sessions_and_conversations(service: ServeRun) -> None:
    async with httpx.AsyncClient(base_url=service.url, timeout=120) as http:
        client = Client(http)

        async def two_run() -> bool:
            """two pipelines run"""
            return len(await client.counted("num_running")) == 2

        await eventually(two_run, 60)
        sessions: dict[str, str] = {}  # one for each pipeline
        for number in range(20):
            if len(sessions) < 2:
                sessions.setdefault(await client.home(f"user-{number}"), f"user-{number}")
        assert len(sessions) == 2

        for number in range(1, 5):  # conversations of no session: what a first turn has computed nobody computes again
            first = list(range(100 * number, 100 * number + 60))
            before = await client.counted("num_prefix_tokens_reused")
            answer = await client.complete(first)
            await client.complete([*first, *answer, 1, 2, 3])
            reused = (await client.counted("num_prefix_tokens_reused") - before).total()
            assert reused == (len(first) + len(answer) - 1) // BLOCK_SIZE * BLOCK_SIZE

        prompt = list(range(60))
        wanted = await client.complete(prompt)
        answers = [asyncio.create_task(client.complete(prompt, session_id)) for session_id in sessions.values()]
        await asyncio.sleep(0.05)
        Processes(service.process.pid).of(Role.PIPELINE)[0].kill()
        assert await asyncio.gather(*answers) == [wanted, wanted]
        assert [await client.complete(prompt, session_id) for session_id in sessions.values()] == [wanted, wanted]
        await eventually(two_run, 60)
        new = await client.counted("num_running")
        (kept,) = sessions.keys() & new.keys()
        homes = {home: await client.home(session_id) for home, session_id in sessions.items()}
        assert homes[kept] in new
        assert set(homes.values()) <= new.keys()
