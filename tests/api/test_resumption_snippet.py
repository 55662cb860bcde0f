"""The client that docs/generation.md shows, against a server that cuts connections."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
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


@pytest.fixture
def cutting(app: FastAPI) -> Iterator[tuple[str, Cutting]]:
    """Its address, and itself."""
    middleware = Cutting(app)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(middleware, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions", middleware
        server.should_exit = True
        thread.join(timeout=10)


@pytest.fixture
def chunks() -> Callable[..., Iterator[Any]]:
    names: dict[str, Any] = {}
    exec(compile(DEFINITIONS, "docs/generation.md", "exec"), names)
    names["time"] = type("Time", (), {"sleep": staticmethod(lambda seconds: None)})
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
