"""The client that docs/generation.md shows, against a server that cuts connections."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.serving.documents import ROOT, blocks

MAX_BYTES = 1000
"""So much of an answer comes over one connection."""

(SNIPPET,) = [b.code for b in blocks(ROOT / "docs" / "generation.md") if "Last-Event-ID" in b.code]
DEFINITIONS, EXAMPLE = SNIPPET.split("\nbody = ")


class Cutting:
    """Ends every other request with an error, and of the others' answers cuts off what is over `MAX_BYTES`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_requests += 1
        if self.num_requests % 2 == 0:
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b"nobody is there"})
            return
        num_left = MAX_BYTES

        async def cut(message: Message) -> None:
            nonlocal num_left
            body = message.get("body", b"")
            if len(body) > num_left:
                await send({"type": "http.response.body", "body": body[:num_left], "more_body": True})
                raise asyncio.CancelledError
            num_left -= len(body)
            await send(message)

        await self._app(scope, receive, cut)


class Lingering:
    """Cuts the first answer after `MAX_BYTES`, but goes on with it inside until a request was refused."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._first: asyncio.Task[None] | None = None
        self._has_noticed = asyncio.Event()
        self.statuses: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._first is None:
            is_cut = asyncio.Event()
            self._first = asyncio.create_task(self._app(scope, self._unaware(receive), self._cutting(send, is_cut)))
            await is_cut.wait()
            raise asyncio.CancelledError
        await self._app(scope, receive, self._noticing(send, self._first))

    def _unaware(self, receive: Receive) -> Receive:
        async def receive_late() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                await self._has_noticed.wait()
            return message

        return receive_late

    def _cutting(self, send: Send, is_cut: asyncio.Event) -> Send:
        num_left = MAX_BYTES

        async def cut(message: Message) -> None:
            nonlocal num_left
            num_left -= len(message.get("body", b""))
            if message["type"] == "http.response.start":
                self.statuses.append(message["status"])
            if num_left < 0:
                is_cut.set()
                await self._has_noticed.wait()
                raise asyncio.CancelledError
            await send(message)

        return cut

    def _noticing(self, send: Send, first: asyncio.Task[None]) -> Send:
        async def notice(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses.append(message["status"])
                self._has_noticed.set()
                with suppress(asyncio.CancelledError):
                    await first
            await send(message)

        return notice


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The address of its completions."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        finally:
            server.should_exit = True
            thread.join(timeout=10)


@pytest.fixture
def cutting(app: FastAPI) -> Iterator[tuple[str, Cutting]]:
    """Its address, and itself."""
    middleware = Cutting(app)
    with serving(middleware) as url:
        yield url, middleware


@pytest.fixture
def pauses_s() -> list[float]:
    """How long the snippet would have slept."""
    return []


@pytest.fixture
def chunks(pauses_s: list[float]) -> Callable[..., Iterator[Any]]:
    names: dict[str, Any] = {}
    exec(compile(DEFINITIONS, "docs/generation.md", "exec"), names)
    names["time"] = type("Time", (), {"sleep": staticmethod(pauses_s.append)})
    return names["chunks"]


def test_all_chunks_come_once(cutting: tuple[str, Cutting], chunks: Callable[..., Iterator[Any]]) -> None:
    url, server = cutting
    usage = {"include_usage": True}
    body = {"model": "tiny", "prompt": "The fox", "max_tokens": 30, "seed": 4, "stream": True, "stream_options": usage}
    *pieces, last = chunks(url, body)
    assert server.num_requests > 10, "the connection was hardly ever cut"
    whole = {name: value for name, value in body.items() if not name.startswith("stream")}
    server.num_requests = 0
    answer = httpx.post(url, json=whole).json()
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == answer["choices"][0]["text"]
    assert pieces[-1]["choices"][0]["finish_reason"] == answer["choices"][0]["finish_reason"]
    assert last["usage"] == answer["usage"]
    assert len({piece["id"] for piece in [*pieces, last]}) == 1


def test_what_is_refused_is_not_tried_again(cutting: tuple[str, Cutting], chunks: Callable[..., Iterator[Any]]) -> None:
    url, server = cutting
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        list(chunks(url, {"model": "tiny", "prompt": "The fox", "max_tokens": -1, "stream": True}))
    assert server.num_requests == 1


def test_a_limited_key_gets_the_rest_once_the_cut_stream_counts_no_longer(
    tmp_path: Path, app_with: Callable[..., FastAPI], chunks: Callable[..., Iterator[Any]], pauses_s: list[float]
) -> None:
    key = {"name": "first", "key": "limited-0001", "max_concurrent_requests": 1}
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [key]}))
    app = app_with(api_keys_file=str(tmp_path / "keys.json"))
    body = {"model": "tiny", "prompt": "The fox", "max_tokens": 30, "seed": 4}
    middleware = Lingering(app)
    with serving(middleware) as url:
        pieces = list(chunks(url, body | {"stream": True}, key["key"]))
        assert middleware.statuses == [200, 429, 200]
        answer = httpx.post(url, json=body, headers={"X-API-Key": key["key"]}).json()
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == answer["choices"][0]["text"]
    assert pauses_s == [pytest.approx(0.2), 1]  # the service's own Retry-After


def test_a_cut_stream_without_ids_is_not_begun_again(
    cutting: tuple[str, Cutting], chunks: Callable[..., Iterator[Any]]
) -> None:
    url, server = cutting
    body = {"model": "tiny", "prompt": "The fox", "max_tokens": 30, "seed": 4, "stream": True, "max_time": 60}
    pieces = chunks(url, body)
    texts = [next(pieces)["choices"][0]["text"]]
    with pytest.raises(httpx.RemoteProtocolError):
        texts.extend(piece["choices"][0]["text"] for piece in pieces)
    assert server.num_requests == 1
    server.num_requests = 0
    whole = {name: value for name, value in body.items() if name != "stream"}
    text = httpx.post(url, json=whole).json()["choices"][0]["text"]
    assert text.startswith("".join(texts))
    assert text != "".join(texts)
