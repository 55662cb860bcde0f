"""ASGI middleware: a Serve proxy that is gone is a client that has left.

When Serve shuts down it kills its proxies first. What an ingress still has to answer then can't reach anyone, and
would hold up the shutdown for as long as replicas may drain. A stream watches for its client to leave and ends. An
answer in one piece does not: Serve cancels it when a proxy says that the client has left, which a dead one does not.
"""

import asyncio

from ray.exceptions import RayError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LEAVING_S = 1.0
"""Whoever watches ends by itself within this time."""


class ProxyLossIsDisconnect:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = asyncio.current_task()
        assert call is not None
        messages: asyncio.Queue[Message | Exception] = asyncio.Queue()
        is_cancelled = False

        async def read() -> None:
            nonlocal is_cancelled
            try:
                while (message := await receive())["type"] != "http.disconnect":
                    messages.put_nowait(message)
                messages.put_nowait(message)
            except RayError:
                messages.put_nowait({"type": "http.disconnect"})
                await asyncio.sleep(LEAVING_S)
                is_cancelled = True
                call.cancel()
            except Exception as error:
                messages.put_nowait(error)

        async def receive_or_disconnect() -> Message:
            message = await messages.get()
            if isinstance(message, Exception) or message["type"] == "http.disconnect":
                messages.put_nowait(message)  # for whoever asks again
            if isinstance(message, Exception):
                raise message
            return message

        reader = asyncio.create_task(read())
        try:
            await self._app(scope, receive_or_disconnect, send)
        except asyncio.CancelledError:
            if not is_cancelled or call.uncancel() > 0:
                raise
        finally:
            reader.cancel()
