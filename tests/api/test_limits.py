"""How much is let in: per API key, and in all. What was taken is given back, however a request ends."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from calls import Call, events
from fakes import FakeEngine
from fastapi import FastAPI

from gptj_serve.api.door.accounts import Accounts, KeyAccount
from gptj_serve.api.door.api_keys import ApiKey
from gptj_serve.errors import OverloadedError, RateLimitedError
from gptj_serve.types import FailureEvent

KEY, OTHER = {"X-API-Key": "limited-0001"}, {"X-API-Key": "limited-0002"}
GENERATE = {"inputs": "The fox", "parameters": {"max_new_tokens": 10}}
COMPLETE = {"model": "tiny", "prompt": "The fox", "max_tokens": 10, "seed": 1}
CALLS = [("/generate", GENERATE), ("/v1/completions", COMPLETE), ("/classify", {"inputs": ["a", "b"]})]
STREAMS = [("/generate_stream", GENERATE), ("/v1/completions", COMPLETE | {"stream": True, "n": 2})]
JSON = {"content-type": "application/json"}


@pytest.fixture
def limited(tmp_path: Path, app_with: Callable[..., FastAPI]) -> Callable[..., FastAPI]:
    """`limited(**limits)` → the application with these limits for KEY, and none for OTHER."""

    def make(*, ingress: dict[str, Any] | None = None, **limits: int) -> FastAPI:
        keys = [{"name": "first", "key": KEY["X-API-Key"], **limits}, {"name": "second", "key": OTHER["X-API-Key"]}]
        (tmp_path / "keys.json").write_text(json.dumps({"keys": keys}))
        return app_with(api_keys_file=str(tmp_path / "keys.json"), **(ingress or {}))

    return make


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_so():
            await asyncio.sleep(0)


def _rate_limited(path: str, message: str) -> dict[str, Any]:
    if path.startswith("/v1/"):
        return {"error": {"message": message, "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"}}
    return {"error": message, "error_type": "rate_limit"}


# ── requests at a time, of a key ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("path", "body"), [*CALLS, *STREAMS])
async def test_a_key_has_so_many_requests_at_a_time(
    limited: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], httpx.AsyncClient],
    engine: FakeEngine,
    path: str,
    body: Any,
) -> None:
    client = client_of(limited(max_concurrent_requests=2))
    engine.pause_at = 0
    running = [asyncio.create_task(client.post(path, json=body, headers=KEY)) for _ in range(2)]
    num_sequences = 1 if path.startswith("/generate") or body == COMPLETE else 2
    await _until(lambda: engine.num_running == 2 * num_sequences)
    refused = await client.post(path, json=body, headers=KEY)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json() == _rate_limited(path, "this API key may have 2 requests at a time at this ingress")
    assert refused.headers["x-ratelimit-limit-requests"] == "2"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await client.get("/v1/models", headers=KEY)).status_code == 200
    other = asyncio.create_task(client.post(path, json=body, headers=OTHER))
    await _until(lambda: engine.num_running == 3 * num_sequences)
    engine.resumed.set()
    assert [response.status_code for response in await asyncio.gather(*running, other)] == [200] * 3
    again = await client.post(path, json=body, headers=KEY)
    assert (again.status_code, again.headers["x-ratelimit-remaining-requests"]) == (200, "1")


REFUSED = [
    ("/generate", {"inputs": 5}, 422),
    ("/v1/completions", {"model": "other", "prompt": "a"}, 404),
    ("/generate", {"inputs": " " * 5000}, 413),
    ("/nowhere", {}, 404),
    ("/health", {}, 405),
]


@pytest.mark.parametrize(("path", "body", "status"), REFUSED)
async def test_a_refused_request_gives_its_place_back(
    limited: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], httpx.AsyncClient],
    path: str,
    body: Any,
    status: int,
) -> None:
    app = limited(max_concurrent_requests=1, ingress={"max_body_bytes": 4096, "max_ongoing_requests": 1})
    client = client_of(app)
    for _ in range(3):
        assert (await client.post(path, json=body, headers=KEY)).status_code == status
    assert app.state.ongoing.num_requests == 0
    assert (await client.post("/generate", json=GENERATE, headers=KEY)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "index", "status"),
    [*((path, body, 0, 500) for path, body in [*CALLS, *STREAMS]), *((path, body, 3, 200) for path, body in STREAMS)],
)
@pytest.mark.parametrize("failure", ["a stage was lost", RuntimeError("unforeseen")])
async def test_a_failed_request_gives_its_place_back(
    limited: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], httpx.AsyncClient],
    engine: FakeEngine,
    path: str,
    body: Any,
    index: int,
    status: int,
    failure: Any,
) -> None:
    app = limited(max_concurrent_requests=1)
    client = client_of(app)
    engine.fail_at = lambda request, at: failure if at == index else None
    for _ in range(3):
        response = await client.post(path, json=body, headers=KEY)
        assert response.status_code == status
        assert "error" in (events(response)[-1] if index else response.json())
    assert app.state.ongoing.num_requests == 0


@pytest.mark.parametrize(("path", "body"), STREAMS)
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_a_client_that_hangs_up_gives_its_place_back(
    limited: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], httpx.AsyncClient],
    engine: FakeEngine,
    path: str,
    body: Any,
    spec_version: str,
) -> None:
    app = limited(max_concurrent_requests=1)
    engine.pause_at = 3
    for _ in range(3):
        async with Call(app, path, body, headers=KEY, spec_version=spec_version) as call:
            await call.chunks(3)
            assert app.state.ongoing.num_requests == 1
            assert (await client_of(app).post(path, json=body, headers=KEY)).status_code == 429
            leaving = asyncio.create_task(call.hang_up())
            engine.resumed.set()
            await leaving
        engine.resumed.clear()
        assert engine.num_running == app.state.ongoing.num_requests == 0
    engine.pause_at = None
    assert (await client_of(app).post(path, json=body, headers=KEY)).status_code == 200


async def test_a_cancelled_request_gives_its_place_back(limited: Callable[..., FastAPI], engine: FakeEngine) -> None:
    """Serve cancels the application's task when the client leaves."""
    app = limited(max_concurrent_requests=1)
    engine.pause_at = 0
    for _ in range(3):
        async with Call(app, "/generate", GENERATE, headers=KEY):
            await _until(lambda: engine.num_running == 1)
        assert engine.num_running == app.state.ongoing.num_requests == 0


async def test_a_full_ingress_says_how_long_the_queue_is(
    app_with: Callable[..., FastAPI], client_of: Callable[[FastAPI], httpx.AsyncClient], engine: FakeEngine
) -> None:
    app = app_with(max_ongoing_requests=1)
    engine.pause_at = 0
    async with Call(app, "/generate", GENERATE):
        await _until(lambda: engine.num_running == 1)
        for engine.wait_s, retry_after in ((0.0, "1"), (12.4, "13")):
            response = await client_of(app).post("/generate", json=GENERATE)
            assert response.status_code == 503
            assert response.headers["retry-after"] == retry_after
            assert "1 requests are being answered" in response.text


@pytest.mark.parametrize(
    ("max_time", "header", "expected"), [(None, None, None), (5, None, 5), (5, "2", 2), (1, "2", 1), (None, "2", 2)]
)
async def test_a_request_must_begin_before_its_time_is_over(
    client: httpx.AsyncClient, engine: FakeEngine, max_time: float | None, header: str | None, expected: float | None
) -> None:
    body = {"inputs": "The fox", "parameters": {"max_new_tokens": 1} | ({"max_time": max_time} if max_time else {})}
    await client.post("/generate", json=body, headers={"X-Request-Timeout": header} if header else {})
    (request,) = engine.requests
    assert request.time_left_s == (None if expected is None else pytest.approx(expected, abs=0.5))


# ── tokens per minute, of a key ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("path", "body"), [*CALLS, *STREAMS])
async def test_tokens_that_were_read_and_generated_are_charged(
    limited: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], httpx.AsyncClient],
    engine: FakeEngine,
    path: str,
    body: Any,
) -> None:
    client = client_of(limited(max_tokens_per_minute=1))
    first = await client.post(path, json=body, headers=KEY)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-tokens"] == "1"
    num_read = sum(len(request.prompt_token_ids) for request in engine.requests)
    num_generated = 0 if path == "/classify" else 10 * len(engine.requests)
    refused = await client.post(path, json=body, headers=KEY)
    assert refused.status_code == 429
    assert refused.json() == _rate_limited(path, "this API key has used its 1 tokens per minute at this ingress")
    expected_s = (num_read + num_generated - 1) * 60
    assert int(refused.headers["retry-after"]) == pytest.approx(expected_s, abs=2)
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    assert (await client.post(path, json=body, headers=OTHER)).status_code == 200
    assert (await client.get("/status", headers=KEY)).status_code == 200


async def test_a_key_without_limits_hears_of_none(
    limited: Callable[..., FastAPI], client_of: Callable[[FastAPI], httpx.AsyncClient]
) -> None:
    response = await client_of(limited()).post("/generate", json=GENERATE, headers=KEY)
    assert not [name for name in response.headers if "ratelimit" in name]


class _Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _key(**limits: Any) -> ApiKey:
    return ApiKey("web", b"", **limits)


def _enter(account: KeyAccount) -> float:
    """After how many seconds a request may come; 0 if now."""
    try:
        with account.request():
            return 0
    except RateLimitedError as error:
        return error.retry_after_s


def test_the_bucket_refills_and_holds_one_minute() -> None:
    clock = _Clock()
    account = KeyAccount(_key(max_tokens_per_minute=60), 1, clock)
    account.spend(59)
    assert _enter(account) == 0
    account.spend(11)  # 10 too many
    assert _enter(account) == 11
    clock.now_s += 10
    assert (account.num_tokens_left, _enter(account)) == (0, 1)
    clock.now_s += 1
    assert (account.num_tokens_left, _enter(account)) == (1, 0)
    assert account.headers()["x-ratelimit-reset-tokens"] == "59.000s"
    clock.now_s += 3600
    assert account.num_tokens_left == 60


@pytest.mark.parametrize(
    ("failure", "status", "is_charged"),
    [
        (OverloadedError("full", 1.0), 503, False),
        (FailureEvent("r", "its time was over", retry_after_s=7.0), 503, False),
        ("a stage was lost", 500, False),
        (FailureEvent("r", "no token is left", is_request_at_fault=True), 422, True),
    ],
)
async def test_what_was_not_taken_on_costs_nothing(
    limited: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], httpx.AsyncClient],
    engine: FakeEngine,
    failure: Any,
    status: int,
    is_charged: bool,
) -> None:
    client = client_of(limited(max_tokens_per_minute=10))
    engine.fail_at = lambda request, index: failure
    response = await client.post("/generate", json=GENERATE, headers=KEY)
    assert response.status_code == status
    num_charged = len(engine.requests[0].prompt_token_ids) if is_charged else 0
    assert response.headers["x-ratelimit-remaining-tokens"] == str(10 - num_charged)


@pytest.mark.parametrize(("num_tokens", "limit"), [(1, 7), (10, 7), (1000, 3), (12345, 999)])
def test_after_retry_after_the_next_request_is_let_in(num_tokens: int, limit: int) -> None:
    clock = _Clock()
    account = KeyAccount(_key(max_tokens_per_minute=limit), 1, clock)
    account.spend(limit + num_tokens)
    wait_s = _enter(account)
    clock.now_s += wait_s - 1.001
    assert _enter(account) > 0
    clock.now_s += 1.001
    assert _enter(account) == 0


def test_several_ingresses_share_a_keys_limits() -> None:
    for num_shares, requests, tokens in ((1, 5, 100), (2, 2, 50), (3, 1, 33), (200, 1, 1)):
        account = KeyAccount(_key(max_concurrent_requests=5, max_tokens_per_minute=100), num_shares)
        assert (account.max_requests, account.max_tokens_per_minute) == (requests, tokens)


def test_an_account_outlives_changes_of_its_key() -> None:
    clock = _Clock()
    accounts = Accounts(1, clock)
    account = accounts.of(_key(max_tokens_per_minute=60))
    with account.request():
        account.spend(70)
        changed = accounts.of(ApiKey("web", b"new", max_concurrent_requests=1, max_tokens_per_minute=120))
        assert changed is account
        assert (account.num_tokens_left, account.max_requests, account.num_requests) == (-10, 1, 1)
        clock.now_s += 2
        assert account.num_tokens_left == -6
    accounts.of(_key())
    account.spend(1000)
    assert _enter(account) == 0
    accounts.of(_key(max_tokens_per_minute=60))
    assert account.num_tokens_left == 60
    assert accounts.of(ApiKey("other", b"")) is not account


@pytest.mark.parametrize(("path", "body"), [*CALLS, *STREAMS])
async def test_where_the_queue_is_too_long_nothing_is_read(
    app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any
) -> None:
    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    engine.wait_s = 72.5
    refused = await client.post(path, content=unread(), headers=JSON)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "13")
    assert "would wait for about 72 s, longer than the service's limit of 60 s" in refused.text
    assert (await client.post(path, json=body, headers={"X-Priority": "-1"})).status_code == 200
    engine.wait_s = 50.0
    refused = await client.post(path, content=unread(), headers=JSON | {"X-Request-Timeout": "20"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "31")
    assert (await client.post(path, json=body)).status_code == 200
    assert app.state.ongoing.num_requests == 0


async def test_what_needs_no_pipeline_waits_in_no_queue(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.wait_s = 1000.0
    assert (await client.post("/tokenize", json={"prompt": "The fox"})).status_code == 200
    assert (await client.get("/v1/models")).status_code == 200


# ── requests at a time, in all ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("path", "body"), [*CALLS, *STREAMS])
async def test_a_full_service_refuses_before_it_reads(
    app_with: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], httpx.AsyncClient],
    engine: FakeEngine,
    path: str,
    body: Any,
) -> None:
    app = app_with(max_ongoing_requests=2)
    client = client_of(app)
    engine.pause_at = 0
    running = [asyncio.create_task(client.post("/generate", json=GENERATE)) for _ in range(2)]
    await _until(lambda: engine.num_running == 2)

    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    refused = await client.post(path, content=unread(), headers=JSON)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    message = "2 requests are being answered, and no more can be"
    openai = {"message": message, "type": "overloaded_error", "param": None, "code": None}
    hugging_face = {"error": message, "error_type": "overloaded"}
    assert refused.json() == ({"error": openai} if path.startswith("/v1/") else hugging_face)
    assert app.state.ongoing.num_requests == app.state.ongoing.max_requests == 2
    for looking in ("/health", "/ready", "/version", "/status", "/v1/models", "/docs"):
        assert (await client.get(looking)).status_code == 200
    engine.resumed.set()
    assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]
    assert (await client.post(path, json=body)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "num_sequences"),
    [
        ("/generate", {"inputs": "The fox", "parameters": {"do_sample": True, "best_of": 3, "max_new_tokens": 1}}, 3),
        ("/classify", {"inputs": ["a", "b"]}, 2),
        ("/v1/completions", {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 1}, 2),
    ],
)
async def test_one_sequence_asks_for_room_for_all(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any, num_sequences: int
) -> None:
    """A request's own sequences are no queue before it."""
    assert (await client.post(path, json=body)).status_code == 200
    assert [request.is_admitted for request in engine.requests] == [False, *[True] * (num_sequences - 1)]
