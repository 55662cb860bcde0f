"""`GET /status`: its shape, and how often the pipelines are asked for it."""

import asyncio

import httpx
import pytest
from fakes import FakeEngine
from pydantic import TypeAdapter

from gptj_serve import __version__
from gptj_serve.api import service_status
from gptj_serve.api.status import Status


async def get_status(client: httpx.AsyncClient) -> Status:
    return TypeAdapter(Status).validate_python((await client.get("/status")).json())


async def test_all_that_is_served(client: httpx.AsyncClient) -> None:
    status = await get_status(client)
    assert (status["model"], status["version"], status["max_model_len"]) == ("tiny", __version__, 64)
    assert status["tasks"] == ["generate", "classify", "qa"]
    assert status["heads"] == {"tone": "classifier", "reader": "qa"}
    assert status["ingress"] == {"num_requests": 0, "max_requests": 1024}
    assert [pipeline["replica_id"] for pipeline in status["pipelines"]] == ["a"]
    assert status["problems"] == ["pipeline b does not answer"]
    assert status["uptime_s"] >= 0


async def test_many_who_look_cost_one_question(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await asyncio.gather(*[get_status(client) for _ in range(20)])
    assert engine.num_status_calls == 1


async def test_the_answer_is_renewed(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_status, "CACHE_S", 0.0)
    await get_status(client)
    engine.num_running = 3
    assert (await get_status(client))["pipelines"][0]["engine"] == {"num_running": 3}


async def test_requests_that_are_being_answered_are_counted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.pause_at = 1
    body = {"inputs": "Paris", "parameters": {"max_new_tokens": 3}}
    requests = [asyncio.create_task(client.post("/generate", json=body)) for _ in range(2)]
    while engine.num_running < 2:
        await asyncio.sleep(0)
    assert (await get_status(client))["ingress"]["num_requests"] == 2
    engine.resumed.set()
    await asyncio.gather(*requests)
    assert (await get_status(client))["ingress"]["num_requests"] == 0
