"""A proxy that is lost ends what the ingress still does for it; no cluster."""

import asyncio
from collections.abc import Callable

import pytest
from ray.exceptions import ActorDiedError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj_serve.serving.proxy_loss import ProxyLossIsDisconnect

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": []}


class Proxy:
    """Sends a body in two messages, then nothing until it is lost or its client leaves."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message | Exception] = asyncio.Queue()
        self.messages.put_nowait({"type": "http.request", "body": b"one ", "more_body": True})
        self.messages.put_nowait({"type": "http.request", "body": b"two", "more_body": False})
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        message = await self.messages.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class App:
    """Answers what it was sent once `goes_on` is set; streams where asked."""

    def __init__(self, *, streams: bool = False) -> None:
        self.streams = streams
        self.began, self.goes_on = asyncio.Event(), asyncio.Event()
        self.outcome = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
            answer: ASGIApp = StreamingResponse(self._pieces(body)) if self.streams else await self._whole(body)
            await answer(scope, receive, send)
            self.outcome = "answered"
        except asyncio.CancelledError:
            self.outcome = "cancelled"
            raise

    async def _whole(self, body: bytes) -> PlainTextResponse:
        self.began.set()
        await self.goes_on.wait()
        return PlainTextResponse(body)

    async def _pieces(self, body: bytes):  # type: ignore[no-untyped-def]
        yield body
        self.began.set()
        await self.goes_on.wait()


def lost(proxy: Proxy) -> None:
    proxy.messages.put_nowait(ActorDiedError())


def left(proxy: Proxy) -> None:
    proxy.messages.put_nowait({"type": "http.disconnect"})


async def begun(app: App, proxy: Proxy) -> asyncio.Task[None]:
    call = asyncio.create_task(ProxyLossIsDisconnect(app)(SCOPE, proxy.receive, proxy.send))
    await asyncio.wait_for(app.began.wait(), 5)
    return call


async def test_an_answer_in_one_piece_is_not_worked_at_for_a_lost_proxy() -> None:
    proxy, app = Proxy(), App()
    call = await begun(app, proxy)
    lost(proxy)
    await asyncio.wait_for(call, 5)
    assert (app.outcome, proxy.sent) == ("cancelled", [])


@pytest.mark.parametrize("end", [lost, left])
async def test_a_stream_ends(end: Callable[[Proxy], None]) -> None:
    proxy, app = Proxy(), App(streams=True)
    call = await begun(app, proxy)
    end(proxy)
    await asyncio.wait_for(call, 5)
    assert proxy.body == b"one two"


@pytest.mark.parametrize("streams", [False, True])
async def test_answers_are_whole_while_the_proxy_lives(streams: bool) -> None:
    proxy, app = Proxy(), App(streams=streams)
    call = await begun(app, proxy)
    app.goes_on.set()
    await asyncio.wait_for(call, 5)
    assert (app.outcome, proxy.body) == ("answered", b"one two")


async def test_what_serve_cancels_is_cancelled() -> None:
    proxy, app = Proxy(), App()
    call = await begun(app, proxy)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call, 5)
    assert app.outcome == "cancelled"


async def test_a_body_that_a_lost_proxy_still_owes_is_a_disconnect() -> None:
    proxy, app = Proxy(), App()
    proxy.messages = asyncio.Queue()
    call = asyncio.create_task(ProxyLossIsDisconnect(app)(SCOPE, proxy.receive, proxy.send))
    lost(proxy)
    with pytest.raises(ClientDisconnect):
        await asyncio.wait_for(call, 5)
