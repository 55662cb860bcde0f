"""Routes for probes."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fakes import FakeEngine, small_model, small_tokenizer
from fastapi import FastAPI

from gptj_serve import __version__
from gptj_serve.config import AutoscalingConfig


class _Pipelines(FakeEngine):
    """Its status is what the test says."""

    pipelines: tuple[dict[str, Any], ...] = ()
    problems: tuple[str, ...] = ()

    def queue_wait_s(self) -> float:
        return 0.0

    async def status(self) -> tuple[list[dict[str, Any]], list[str]]:
        await super().status()
        return list(self.pipelines), list(self.problems)


@pytest.fixture
def engine() -> _Pipelines:
    return _Pipelines(small_model(), small_tokenizer())


async def test_version(client: httpx.AsyncClient) -> None:
    response = await client.get("/version")
    assert (response.status_code, response.json()) == (200, {"version": __version__})


async def test_health_asks_nobody(client: httpx.AsyncClient, engine: _Pipelines) -> None:
    response = await client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert engine.num_status_calls == 0


@pytest.mark.parametrize(
    ("ready", "status"),
    [([], 503), ([False], 503), ([False, False], 503), ([True], 200), ([False, True], 200)],
)
async def test_ready_if_one_pipeline_is(
    client: httpx.AsyncClient, engine: _Pipelines, ready: list[bool], status: int
) -> None:
    listed = [{"replica_id": f"p{index}", "is_ready": is_ready} for index, is_ready in enumerate(ready)]
    engine.pipelines = tuple(each | {"stages": []} for each in listed)
    engine.problems = ("pipeline x does not answer: died",)
    response = await client.get("/ready")
    assert (response.status_code, response.headers.get("retry-after")) == (status, None if status == 200 else "2")
    expected = {"is_ready": status == 200, "pipelines": listed, "scaling": None}
    assert response.json() == expected, "problems are for those with a key"


@pytest.mark.parametrize(
    ("min_pipelines", "ready", "problems", "status"),
    [
        (0, [], [], 200),
        (0, [False], [], 503),
        (0, [], ["p does not answer"], 503),
        (0, [True], [], 200),
        (1, [], [], 503),
    ],
)
async def test_ready_without_a_pipeline_where_a_request_starts_one(
    app_with: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], httpx.AsyncClient],
    engine: _Pipelines,
    min_pipelines: int,
    ready: list[bool],
    problems: list[str],
    status: int,
) -> None:
    scaling = {"min_pipelines": min_pipelines, "max_pipelines": 3}
    client = client_of(app_with(autoscaling=AutoscalingConfig(**scaling)))
    engine.pipelines = tuple({"replica_id": "p", "is_ready": is_ready, "stages": []} for is_ready in ready)
    engine.problems = tuple(problems)
    engine.changes = {"num_starting": 1, "num_stopping": 2}
    response = await client.get("/ready")
    assert response.status_code == status
    assert response.json()["scaling"] == scaling | {"changes": {"num_starting": 1, "num_stopping": 2}}


async def test_probes_and_status_together_are_one_question(client: httpx.AsyncClient, engine: _Pipelines) -> None:
    await asyncio.gather(*[client.get(path) for path in ("/ready", "/status") * 10])
    assert engine.num_status_calls == 1


async def test_a_probe_that_leaves_does_not_stop_the_others(app: FastAPI, engine: _Pipelines) -> None:
    first, second = (asyncio.create_task(app.state.status.get()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second)["model"] == "tiny"


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


@pytest.mark.parametrize("path", ["/health", "/ready", "/version"])
async def test_probes_may_ask_for_the_head_only(client: httpx.AsyncClient, engine: _Pipelines, path: str) -> None:
    engine.pipelines = ({"replica_id": "p", "is_ready": True, "stages": []},)
    response = await client.head(path)
    assert (response.status_code, response.content) == (200, b"")


async def test_the_api_page_asks_nobody_else(client: httpx.AsyncClient) -> None:
    """Its scripts too are to be had without a key, and from here."""
    page = (await client.get("/docs")).text
    assert "https://" not in page
    links = re.findall(r'(?:src|href)="(/[^"]+)"', page)
    assert len(links) == 3
    for link in links:
        assert (await client.get(link)).status_code == 200
