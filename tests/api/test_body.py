"""Bodies that are too large, too slow, too deep, or no text; and clients who leave in the middle of one."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest
import uvicorn
from fakes import FakeEngine
from fastapi import FastAPI

JSON = {"content-type": "application/json"}
ROUTES = ["/generate", "/generate_stream", "/classify", "/qa", "/v1/completions"]


def _message(path: str, response: httpx.Response) -> str:
    body = response.json()
    return body["error"]["message"] if path.startswith("/v1/") else body["error"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("start", [b"", b'{"inputs": '])
async def test_a_body_that_does_not_end_in_time(
    app_with: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], httpx.AsyncClient],
    engine: FakeEngine,
    path: str,
    start: bytes,
) -> None:
    app = app_with(body_timeout_s=0.05)

    async def dribble() -> AsyncIterator[bytes]:
        yield start
        while True:
            assert app.state.ongoing.num_requests == 1
            await asyncio.sleep(0.005)
            yield b" "

    response = await client_of(app).post(path, content=dribble(), headers=JSON)
    assert (response.status_code, response.headers["connection"]) == (408, "close")
    assert _message(path, response) == f"POST {path}: the body was not complete after 0.05 s"
    assert app.state.ongoing.num_requests == 0
    assert engine.requests == []


@pytest.mark.parametrize(
    ("head", "piece", "status"),
    [
        (b"Content-Length: 1000", b" ", b"408 Request Timeout"),
        (b"Transfer-Encoding: chunked", b"1\r\n \r\n", b"408 Request Timeout"),
        (b"Transfer-Encoding: chunked", b"800\r\n" + b" " * 0x800 + b"\r\n", b"413 "),
    ],
)
async def test_a_server_is_rid_of_who_goes_on_sending(
    app_with: Callable[..., FastAPI], head: bytes, piece: bytes, status: bytes
) -> None:
    """The answer comes, the connection is closed, and the server keeps neither connection nor task."""
    app = app_with(body_timeout_s=0.2, max_body_bytes=4096)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(10):
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        loop = asyncio.get_running_loop()
        with socket.socket() as client:  # not a stream, which forgets what it has read when a write of its own fails
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, b"POST /generate HTTP/1.1\r\nHost: test\r\n" + head + b"\r\n\r\n")
            answer = asyncio.create_task(loop.sock_recv(client, 1000))
            while not answer.done():
                with suppress(OSError):
                    await loop.sock_sendall(client, piece)
                await asyncio.wait([answer], timeout=0.02)
            assert answer.result().startswith(b"HTTP/1.1 " + status)
            with suppress(ConnectionResetError):
                while await loop.sock_recv(client, 1000):
                    pass
        while server.server_state.connections or server.server_state.tasks:
            await asyncio.sleep(0.01)
        assert app.state.ongoing.num_requests == 0
        server.should_exit = True
        await serving


async def test_a_slow_answer_is_not_a_slow_body(
    app_with: Callable[..., FastAPI], client_of: Callable[[FastAPI], httpx.AsyncClient], engine: FakeEngine
) -> None:
    engine.pause_at = 0
    client = client_of(app_with(body_timeout_s=0.02))
    call = asyncio.create_task(client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 2}}))
    await asyncio.sleep(0.1)
    engine.resumed.set()
    assert (await call).status_code == 200


async def _call(app: FastAPI, messages: list[dict[str, Any]], headers: list[tuple[bytes, bytes]]) -> list[Any]:
    """What a request whose body comes in these messages is answered with."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    path = "/generate"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "server": ("test", 80), "root_path": ""}
    async with asyncio.timeout(5):
        await app(scope, receive, send)
    return sent


async def test_a_client_that_leaves_before_its_body_is_complete(app: FastAPI, engine: FakeEngine) -> None:
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    assert await _call(app, messages, [(b"content-length", b"100")]) == []
    assert app.state.ongoing.num_requests == 0
    assert engine.requests == []


@pytest.mark.parametrize(
    ("declared", "num_bytes", "status"),
    [(b"10", 4097, 413), (b"10", 4096, 200), (b"-5", 4097, 413), (b"x", 4096, 200), (b"4096", 20, 200)],
)
async def test_the_bytes_that_come_count_not_the_declared_ones(
    app: FastAPI, declared: bytes, num_bytes: int, status: int
) -> None:
    body = b'{"inputs": "a"}'.ljust(num_bytes)
    parts = [body[i : i + 1000] for i in range(0, num_bytes, 1000)]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "more_body": False})
    headers = [(b"content-type", b"application/json"), (b"content-length", declared)]
    start, *_ = await _call(app, messages, headers)
    assert start["status"] == status
    assert (dict(start["headers"]).get(b"connection") == b"close") == (status == 413)


@pytest.mark.parametrize(("num_bytes", "is_closed"), [(4097, False), (64 << 20, False), ((64 << 20) + 1, True)])
async def test_a_connection_is_kept_while_the_rest_of_a_refused_body_is_little(
    client: httpx.AsyncClient, num_bytes: int, is_closed: bool
) -> None:
    response = await client.post("/generate", headers=JSON | {"content-length": str(num_bytes)})
    assert response.status_code == 413
    assert (response.headers.get("connection") == "close") == is_closed


@pytest.mark.parametrize("content_length", ["9" * 4000, "9" * 5000])
async def test_a_declared_size_without_bounds(client: httpx.AsyncClient, content_length: str) -> None:
    response = await client.post("/generate", headers=JSON | {"content-length": content_length})
    assert response.status_code == 413


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b'{"inputs": "\xff"}',
        b'{"inputs": "\xc3"}',
        b"{" * 4000,
        b"[" * 4096,
        b"[" * 2000 + b"]" * 2000,
        b'{"a":' * 600 + b"1" + b"}" * 600,
        b"1" * 4096,
        b'"' + b"\\" * 4001,
        b"\x00",
        b"nul",
    ],
    ids=lambda content: f"{content[:8]!r}…{len(content)}",
)
async def test_a_body_that_can_not_be_parsed(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, content: bytes
) -> None:
    response = await client.post(path, content=content, headers=JSON)
    assert response.status_code in (400, 422)
    assert _message(path, response)
    assert engine.requests == []


@pytest.mark.parametrize("depth", [10, 100, 500, *range(700, 1000, 7), 100_000])
@pytest.mark.parametrize("template", ["%s", '{"inputs": %s}', '{"inputs": "a", "parameters": {"x": %s}}'])
async def test_a_body_that_is_nested_deeply(
    app_with: Callable[..., FastAPI], client_of: Callable[[FastAPI], httpx.AsyncClient], depth: int, template: str
) -> None:
    """At every depth, also those that the parser bears and what comes after it does not."""
    client = client_of(app_with())
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        inner = opening * depth + "1" + closing * depth
        for path in ("/generate", "/v1/completions"):
            response = await client.post(path, content=template % inner, headers=JSON)
            assert response.status_code in (400, 422), response.text
            assert _message(path, response)


GRAMMAR = '{"inputs": "a", "parameters": {"max_new_tokens": 2, "grammar": {"type": "json", "value": SCHEMA}}}'
FORMAT = (
    '{"model": "tiny", "prompt": "a", "max_tokens": 2,'
    '"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}'
)


async def test_a_grammar_that_is_nested_deeply(
    app_with: Callable[..., FastAPI], client_of: Callable[[FastAPI], httpx.AsyncClient]
) -> None:
    client = client_of(app_with())
    for depth in (50, 300, *range(600, 1000, 25), 5000):
        schema = '{"type": "array", "items":' * depth + "{}" + "}" * depth
        content = GRAMMAR.replace("SCHEMA", schema)
        response = await client.post("/generate", content=content, headers=JSON)
        assert response.status_code in (200, 400, 422), (depth, response.text)
        content = FORMAT.replace("SCHEMA", schema)
        response = await client.post("/v1/completions", content=content, headers=JSON)
        assert response.status_code in (200, 400), (depth, response.text)
