"""The headers that all routes understand: the request's id, its priority, its time."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from calls import Call, events
from fakes import FakeEngine
from fastapi import FastAPI

from gptj_serve.api.door import request_headers

GENERATE = {"inputs": "The fox", "parameters": {"max_new_tokens": 10}}
COMPLETE = {"model": "tiny", "prompt": "The fox", "max_tokens": 10, "seed": 1}
CALLS = [("/generate", GENERATE), ("/v1/completions", COMPLETE)]
STREAMS = [("/generate_stream", GENERATE), ("/v1/completions", COMPLETE | {"stream": True})]


def _message(path: str, body: Any) -> str:
    return body["error"]["message"] if path.startswith("/v1/") else body["error"]


@pytest.mark.parametrize(("path", "body"), [*CALLS, *STREAMS])
async def test_a_request_keeps_its_id(client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any) -> None:
    response = await client.post(path, json=body, headers={"X-Request-ID": "job-7/part:1"})
    assert (response.status_code, response.headers.get_list("x-request-id")) == (200, ["job-7/part:1"])
    assert [request.request_id.startswith("job-7/part:1-") for request in engine.requests] == [True]


async def test_a_request_without_an_id_is_given_one(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    ids = [(await client.post("/generate", json=GENERATE)).headers["x-request-id"] for _ in range(2)]
    assert len(set(ids)) == 2
    for request, request_id in zip(engine.requests, ids, strict=True):
        assert request.request_id.startswith(request_id)
    assert (await client.get("/nowhere")).headers["x-request-id"] not in ids


async def test_the_same_id_twice_at_once(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.pause_at = 3
    headers = {"X-Request-ID": "again"}
    calls = [asyncio.create_task(client.post("/generate", json=GENERATE, headers=headers)) for _ in range(3)]
    while engine.num_running < 3:
        await asyncio.sleep(0)
    engine.resumed.set()
    responses = await asyncio.gather(*calls)
    assert len({response.text for response in responses}) == 1
    assert [response.status_code for response in responses] == [200] * 3
    assert len({request.request_id for request in engine.requests}) == 3


async def test_an_id_that_somebody_in_front_sends_back_is_not_sent_twice(
    app_with: Callable[..., FastAPI], client_of: Callable[[FastAPI], httpx.AsyncClient], engine: FakeEngine
) -> None:
    client = client_of(app_with(echoes_request_id=False))
    for response in (
        await client.post("/generate", json=GENERATE, headers={"X-Request-ID": "mine"}),
        await client.post("/generate", json=GENERATE, headers={"X-Request-ID": "not mine"}),
    ):
        assert "x-request-id" not in response.headers
        assert response.headers["x-content-type-options"] == "nosniff"
    assert engine.requests[0].request_id.startswith("mine-")


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/models", "/status"])
@pytest.mark.parametrize(
    ("header", "value", "reason"),
    [
        ("X-Request-ID", "", "must be 1 to 128 printable ASCII characters, no blanks"),
        ("X-Request-ID", "a b", "must be 1 to 128 printable ASCII characters, no blanks"),
        ("X-Request-ID", "a\tb", "must be 1 to 128 printable ASCII characters, no blanks"),
        ("X-Request-ID", "é", "must be 1 to 128 printable ASCII characters, no blanks"),
        ("X-Request-ID", "a\x7f", "must be 1 to 128 printable ASCII characters, no blanks"),
        ("X-Session-Id", "", "must be 1 to 128 printable ASCII characters, no blanks"),
        ("X-Session-Id", "a b", "must be 1 to 128 printable ASCII characters, no blanks"),
        ("X-Session-Id", "é", "must be 1 to 128 printable ASCII characters, no blanks"),
        ("X-Priority", "1001", "must be an integer from -1000 to 1000"),
        ("X-Priority", "-1001", "must be an integer from -1000 to 1000"),
        ("X-Priority", "1.5", "must be an integer from -1000 to 1000"),
        ("X-Priority", "high", "must be an integer from -1000 to 1000"),
        ("X-Priority", "1_0", "must be an integer from -1000 to 1000"),
        ("X-Priority", "", "must be an integer from -1000 to 1000"),
        ("X-Priority", "9" * 5000, "must be an integer from -1000 to 1000"),
        ("X-Request-Timeout", "0", "must be a number of seconds above 0"),
        ("X-Request-Timeout", "-1", "must be a number of seconds above 0"),
        ("X-Request-Timeout", "nan", "must be a number of seconds above 0"),
        ("X-Request-Timeout", "inf", "must be a number of seconds above 0"),
        ("X-Request-Timeout", "1e999", "must be a number of seconds above 0"),
        ("X-Request-Timeout", "1_0", "must be a number of seconds above 0"),
        ("X-Request-Timeout", "1.2.3", "must be a number of seconds above 0"),
        ("X-Request-Timeout", "30s", "must be a number of seconds above 0"),
        ("X-Request-Timeout", "", "must be a number of seconds above 0"),
    ],
)
async def test_a_wrong_header_is_refused_by_name(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, header: str, value: str, reason: str
) -> None:
    method = "POST" if path in ("/generate", "/v1/completions") else "GET"
    response = await client.request(method, path, headers=[(header.encode(), value.encode("latin-1"))])
    assert response.status_code == 400
    shown = repr(value) if len(value) < 90 else f"'{'9' * 98}…"
    assert _message(path, response.json()) == f"{method} {path}: {header}={shown}: {reason}"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert len(response.headers["x-request-id"]) == 16
    assert engine.requests == []


@pytest.mark.parametrize(("path", "body"), [*CALLS, ("/classify", {"inputs": ["a", "b"]}), ("/embed", {"inputs": "a"})])
async def test_all_sequences_of_a_request_are_of_its_session(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any
) -> None:
    for session_id in ("user-7", "~" * 128):
        response = await client.post(path, json=body, headers={"X-Session-Id": session_id})
        assert response.status_code == 200, response.text
        assert {request.session_id for request in engine.requests} == {session_id}
        engine.requests.clear()
    await client.post(path, json=body)
    assert {request.session_id for request in engine.requests} == {""}
    response = await client.post(path, json=body, headers={"X-Session-Id": "~" * 129})
    assert response.status_code == 400


async def test_headers_at_their_limits(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for headers in (
        {"X-Request-ID": "a" * 128, "X-Priority": "-1000", "X-Request-Timeout": "1e300"},
        {"X-Request-ID": "~", "X-Priority": "+1000", "X-Request-Timeout": "99.5"},
    ):
        assert (await client.post("/generate", json=GENERATE, headers=headers)).status_code == 200
    assert [request.priority for request in engine.requests] == [-1000, 1000]
    response = await client.post("/generate", json=GENERATE, headers={"X-Request-ID": "a" * 129})
    assert response.status_code == 400


async def test_a_header_sent_twice_is_refused(client: httpx.AsyncClient) -> None:
    response = await client.get("/health", headers=[("X-Priority", "1"), ("X-Priority", "2")])
    assert (response.status_code, response.json()["error"]) == (
        400,
        "GET /health: X-Priority='1, 2': must be sent once",
    )


@pytest.mark.parametrize(("path", "body"), [*CALLS, ("/classify", {"inputs": ["a", "b"]})])
async def test_priority_is_the_headers_unless_the_body_has_one(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any
) -> None:
    await client.post(path, json=body, headers={"X-Priority": "-7"})
    assert {request.priority for request in engine.requests} == {-7}
    engine.requests.clear()
    await client.post(path, json=body)
    assert {request.priority for request in engine.requests} == {0}
    engine.requests.clear()
    if path == "/v1/completions":
        await client.post(path, json=body | {"priority": 3}, headers={"X-Priority": "-7"})
        assert {request.priority for request in engine.requests} == {3}


def _is_timeout(path: str, body: Any) -> bool:
    message = _message(path, body)
    assert re.fullmatch(r"the request was not finished after [0-9.]+ s", message)
    if path.startswith("/v1/"):
        return body == {"error": {"message": message, "type": "timeout_error", "param": None, "code": None}}
    return body == {"error": message, "error_type": "timeout"}


@pytest.mark.parametrize(("path", "body"), [*CALLS, *STREAMS, ("/classify", {"inputs": ["a", "b"]})])
async def test_a_request_ends_when_its_time_is_over(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine, path: str, body: Any
) -> None:
    engine.pause_at = 0
    response = await client.post(path, json=body, headers={"X-Request-Timeout": "0.05"})
    assert response.status_code == 504
    assert _is_timeout(path, response.json())
    assert engine.num_running == 0
    assert len(engine.aborted) == len(engine.requests)
    assert app.state.ongoing.num_requests == 0


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_a_stream_ends_with_an_error_when_its_time_is_over(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine, path: str, body: Any
) -> None:
    engine.pause_at = 3
    response = await client.post(path, json=body, headers={"X-Request-Timeout": "0.5"})
    assert response.status_code == 200
    *tokens, last = events(response)
    assert len(tokens) == 3
    assert _is_timeout(path, last)
    assert engine.num_running == app.state.ongoing.num_requests == 0


async def test_the_services_limit_is_default_and_upper_bound(
    app_with: Callable[..., FastAPI], client_of: Callable[[FastAPI], httpx.AsyncClient], engine: FakeEngine
) -> None:
    client = client_of(app_with(request_timeout_s=0.05))
    engine.pause_at = 0
    for headers in ({}, {"X-Request-Timeout": "3600"}):
        async with asyncio.timeout(5):
            assert (await client.post("/generate", json=GENERATE, headers=headers)).status_code == 504


async def test_what_hangs_before_the_engine_is_asked_is_in_time_too(client: httpx.AsyncClient, app: FastAPI) -> None:
    is_cancelled = asyncio.Event()

    @app.post("/hang")
    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            is_cancelled.set()

    response = await client.post("/hang", json={}, headers={"X-Request-Timeout": "0.05", "X-Request-ID": "slow"})
    assert response.status_code == 504
    assert _is_timeout("/hang", response.json())
    assert response.headers["x-request-id"] == "slow"
    assert is_cancelled.is_set()


async def test_a_body_that_does_not_come_is_in_time_too(client: httpx.AsyncClient) -> None:
    async def dribble():
        while True:
            yield b" "
            await asyncio.sleep(0.005)

    response = await client.post("/generate", content=dribble(), headers={"X-Request-Timeout": "0.05"})
    assert response.status_code == 504


async def test_a_client_that_takes_nothing_is_left_after_its_time(
    app: FastAPI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(request_headers, "LAST_WORDS_S", 0.05)
    headers = {"X-Request-Timeout": "0.5", "X-Request-ID": "mute"}
    async with Call(app, "/generate_stream", GENERATE, headers=headers, stuck_after=2) as call, asyncio.timeout(5):
        await call.chunks(1)
        await call.task
    assert engine.num_running == app.state.ongoing.num_requests == 0
    assert "request mute: its client took nothing more" in caplog.text


async def test_an_unexpected_error_has_the_headers_of_all_others(
    app_with: Callable[..., FastAPI], client_of: Callable[[FastAPI], httpx.AsyncClient], engine: FakeEngine
) -> None:
    client = client_of(app_with(cors_origins=["https://example.org"]))
    engine.fail_at = lambda request, index: KeyError("secret")
    headers = {"X-Request-ID": "broken", "Origin": "https://example.org"}
    response = await client.post("/generate", json=GENERATE, headers=headers)
    assert (response.status_code, response.json()["error_type"]) == (500, "internal")
    assert response.headers["x-request-id"] == "broken"
    assert response.headers["access-control-allow-origin"] == "https://example.org"


async def test_an_unexpected_timeout_is_not_the_requests(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail_at = lambda request, index: TimeoutError()
    response = await client.post("/generate", json=GENERATE, headers={"X-Request-Timeout": "60"})
    assert (response.status_code, response.json()["error_type"]) == (500, "internal")
