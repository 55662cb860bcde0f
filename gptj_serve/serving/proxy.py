"""ASGI middleware for Serve's HTTP proxies, outside the application: against clients who don't read or who speak to
Serve itself, and for lost ingresses.

A proxy is a process of the cluster's, not of the application's: it takes these from a variable of its environment,
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=gptj_serve.serving.proxy:middlewares`.
"""

import asyncio
import logging
import socket

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj_serve.api.errors import error_response
from gptj_serve.environment import slow_client_timeout_s
from gptj_serve.errors import OverloadedError

logger = logging.getLogger("ray.serve")  # the one that a proxy shows

SERVES_OWN_HEADERS = frozenset({b"x-request-disconnect-disabled", b"x-request-timeout-seconds"})
"""With the first a request outlives its client; the second is a time limit that the application knows nothing of."""

INGRESS_LOST = OverloadedError("the process that was answering this request was lost; send it again", 1.0)


def middlewares() -> list[Middleware]:
    """What Serve asks for once, when a proxy starts."""
    timeout_s = slow_client_timeout_s()
    logger.info("clients who read nothing for %g s are cut off", timeout_s)
    return [
        Middleware(AnswersForLostIngress),
        Middleware(DropsServesOwnHeaders),
        Middleware(SlowClientsLeave, timeout_s=timeout_s),
    ]


class SlowClientsLeave:
    """Cuts off a client who takes nothing of its answer for `timeout_s`, or dribbles.

    Serve's way from an ingress to a proxy is not bounded: the whole of an answer waits here until it is read. What is
    left when the answer is complete is in the hands of the kernel, which is told the same time.
    """

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self._app = app
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        transport = _transport(send)
        connection = transport.get_extra_info("socket")
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # it is Linux's
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._timeout_s * 1000))

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await send(message)
            except TimeoutError:
                logger.warning("a client of %s reads too slowly and is cut off", scope["path"])
                transport.abort()  # the server then takes it for one who has left

        await self._app(scope, receive, send_in_time)


class DropsServesOwnHeaders:
    """Serve obeys headers of its own, whoever sends them: clients have no say in that."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            kept = [(name, value) for name, value in scope["headers"] if name not in SERVES_OWN_HEADERS]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)


class AnswersForLostIngress:
    """An answer that has not begun when its ingress is lost becomes an error in the shape of its route.

    One that has begun breaks off, as any stream does whose connection is lost.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = has_left = False

        async def watch(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        async def receive_or_leave() -> Message:
            nonlocal has_left
            message = await receive()
            has_left |= message["type"] == "http.disconnect"
            return message

        await self._app(scope, receive_or_leave, watch)
        if scope["type"] == "http" and not has_begun and not has_left:
            response = error_response(Request(scope), INGRESS_LOST)
            await response(scope, receive, send)


def _transport(send: Send) -> asyncio.Transport:
    """Of the connection that uvicorn's own `send` writes to: ASGI has no way to end one."""
    transport: asyncio.Transport = send.__self__.transport  # type: ignore[attr-defined]
    return transport
