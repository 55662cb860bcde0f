"""Routes for probes."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
from fakes import FakeEngine
from fastapi import FastAPI

from gptj_serve import __version__
from gptj_serve.api.health import CACHED_S, Readiness
from gptj_serve.errors import OverloadedError
from gptj_serve.types import EngineRequest, Event


class _Pipelines:
    """An `EngineClient` that only has a status."""

    def __init__(self) -> None:
        self.answer: list[dict[str, Any]] | Exception = []
        self.num_asked = 0

    async def submit(self, request: EngineRequest) -> AsyncGenerator[Event]:
        raise AssertionError("nothing is asked of the engine")
        yield

    async def status(self) -> list[dict[str, Any]]:
        self.num_asked += 1
        await asyncio.sleep(0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def _pipeline(name: str, is_ready: bool) -> dict[str, Any]:
    return {"replica_id": name, "is_ready": is_ready, "stages": [], "engine": {}}


@pytest.fixture
def pipelines(app: FastAPI) -> _Pipelines:
    pipelines = _Pipelines()
    app.state.readiness = Readiness(pipelines)
    return pipelines


async def test_version(client: httpx.AsyncClient) -> None:
    response = await client.get("/version")
    assert (response.status_code, response.json()) == (200, {"version": __version__})


async def test_health_asks_nobody(client: httpx.AsyncClient, pipelines: _Pipelines) -> None:
    pipelines.answer = OverloadedError("a pipeline does not answer", 5.0)
    response = await client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert pipelines.num_asked == 0


async def test_a_service_over_an_engine_is_ready(client: httpx.AsyncClient) -> None:
    response = await client.get("/ready")
    assert response.status_code == 200
    assert response.json() == {"is_ready": True, "pipelines": [{"replica_id": "fake", "is_ready": True}]}


@pytest.mark.parametrize(
    ("ready", "status"),
    [([], 503), ([False], 503), ([False, False], 503), ([True], 200), ([False, True], 200)],
)
async def test_ready_if_one_pipeline_is(
    client: httpx.AsyncClient, pipelines: _Pipelines, ready: list[bool], status: int
) -> None:
    pipelines.answer = [_pipeline(f"p{index}", is_ready) for index, is_ready in enumerate(ready)]
    response = await client.get("/ready")
    assert (response.status_code, response.headers.get("retry-after")) == (status, None if status == 200 else "2")
    listed = [{"replica_id": f"p{index}", "is_ready": is_ready} for index, is_ready in enumerate(ready)]
    assert response.json() == {"is_ready": status == 200, "pipelines": listed}


async def test_not_ready_if_the_pipelines_do_not_answer(client: httpx.AsyncClient, pipelines: _Pipelines) -> None:
    pipelines.answer = OverloadedError("a pipeline does not answer: died", 5.0)
    response = await client.get("/ready")
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.json() == {"is_ready": False, "pipelines": [], "problem": "a pipeline does not answer: died"}


async def test_many_probes_are_one_question() -> None:
    now_s = 0.0
    pipelines = _Pipelines()
    readiness = Readiness(pipelines, clock=lambda: now_s)
    reports = await asyncio.gather(*[readiness.report() for _ in range(20)])
    assert pipelines.num_asked == 1
    assert {report.is_ready for report in reports} == {False}
    pipelines.answer = [_pipeline("p", True)]
    now_s += CACHED_S / 2
    assert not (await readiness.report()).is_ready
    now_s += CACHED_S / 2
    assert (await readiness.report()).is_ready
    assert pipelines.num_asked == 2


async def test_a_probe_that_leaves_does_not_stop_the_others() -> None:
    pipelines = _Pipelines()
    pipelines.answer = [_pipeline("p", True)]
    readiness = Readiness(pipelines)
    first, second = (asyncio.create_task(readiness.report()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).is_ready


@pytest.mark.parametrize("path", ["/health", "/version", "/docs", "/nowhere", "/v1/nowhere"])
async def test_nothing_is_sniffed(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    assert (await client.get(path)).headers["x-content-type-options"] == "nosniff"


ORIGIN = {"Origin": "https://example.org"}


async def test_pages_of_other_origins_may_not_call_unless_set(client: httpx.AsyncClient) -> None:
    for response in (
        await client.get("/version", headers=ORIGIN),
        await client.options("/generate", headers=ORIGIN | {"Access-Control-Request-Method": "POST"}),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", [["https://example.org", "http://localhost:3000"], ["*"]])
async def test_pages_of_set_origins_may(
    app_with: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], httpx.AsyncClient],
    monkeypatch: pytest.MonkeyPatch,
    origins: list[str],
) -> None:
    monkeypatch.setenv("GPTJ_SERVE_API_KEYS", "web-secret-0001")
    client = client_of(app_with(cors_origins=origins, max_body_bytes=100))
    allowed = "*" if origins == ["*"] else ORIGIN["Origin"]
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-priority"}
    preflight = await client.options("/generate", headers=ORIGIN | wanted)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, allowed)
    assert preflight.headers["access-control-allow-headers"] == "authorization,x-priority"
    key = {"X-API-Key": "web-secret-0001"}
    for status, response in {
        200: await client.get("/status", headers=ORIGIN | key),
        400: await client.get("/health", headers=ORIGIN | {"X-Priority": "x"}),
        401: await client.post("/v1/completions", json={}, headers=ORIGIN),
        404: await client.get("/nowhere", headers=ORIGIN | key),
        413: await client.post("/generate", content=b" " * 101, headers=ORIGIN | key),
    }.items():
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, allowed)
        assert response.headers["access-control-expose-headers"] == "X-Request-ID, Retry-After"
    stranger = await client.get("/status", headers={"Origin": "https://evil.example"} | key)
    assert stranger.headers.get("access-control-allow-origin") == ("*" if origins == ["*"] else None)
