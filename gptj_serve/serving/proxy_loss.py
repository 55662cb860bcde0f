"""ASGI middleware: a Serve proxy that is gone is a client that has left.

When Serve shuts down it kills its proxies first. What an ingress still has to answer then can't reach anyone, and
Serve's `receive` raises for each open stream, of which a traceback would be logged.
"""

from ray.exceptions import RayError
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class ProxyLossIsDisconnect:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_or_disconnect() -> Message:
            try:
                return await receive()
            except RayError:
                return {"type": "http.disconnect"}

        await self._app(scope, receive_or_disconnect, send)
