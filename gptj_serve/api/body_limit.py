"""The limit on a request's body, refused with the error object that everything else has (starlette's is plain text)."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj_serve.api.errors import http_error_response


class BodyLimit:
    """ASGI middleware: 413 for a body over the limit, by its Content-Length or, without one, as it is read."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            response = http_error_response(Request(scope), self._too_large(f"of {declared} bytes "))
            await response(scope, receive, send)
            return
        num_bytes = 0

        async def limited_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        await self._app(scope, limited_receive, send)

    def _too_large(self, size: str = "") -> HTTPException:
        return HTTPException(413, f"the body {size}is over the limit of {self._max_body_bytes} bytes")
