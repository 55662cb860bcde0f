"""Reading a request's body: within its limits of size and time, and before any work is done for it."""

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope

CLOSE = {"Connection": "close"}
"""Of what is refused while the client still sends, and may go on for ever."""

MAX_UNREAD_BYTES = 64 << 20
"""So much of a refused body the server still takes and drops: a client that sends all before it reads gets its 413."""

MAX_DIGITS = 18
"""Of a declared size: Python takes no number of thousands of digits."""


class ClientLeftError(Exception):
    """The client has hung up before its body was complete: nobody is there to answer."""


def check_declared_size(scope: Scope, max_body_bytes: int) -> None:
    """Raises `HTTPException` 413."""
    declared = Headers(scope=scope).get("content-length", "")
    num_bytes = int(declared[:MAX_DIGITS]) if declared.isdecimal() else 0  # what comes is counted in any case
    if num_bytes > max_body_bytes:
        raise _too_large(max_body_bytes, f"of {num_bytes} bytes ", CLOSE if num_bytes > MAX_UNREAD_BYTES else None)


async def read_body(receive: Receive, max_body_bytes: int, timeout_s: float) -> Receive:
    """Read all of the body, whatever its length was declared to be; what is returned gives it to the application.

    Raises `HTTPException` 413 or 408, and `ClientLeftError`.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeftError
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > max_body_bytes:
                    raise _too_large(max_body_bytes, headers=CLOSE if more else None)
    except TimeoutError:
        reason = f"the body was not complete after {timeout_s:g} s"
        raise HTTPException(408, reason, CLOSE) from None
    complete: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

    async def replayed() -> Message:
        nonlocal complete
        if complete is None:
            return await receive()  # what comes after the body: that the client has left
        message, complete = complete, None
        return message

    return replayed


def _too_large(max_body_bytes: int, size: str = "", headers: dict[str, str] | None = None) -> HTTPException:
    reason = f"the body {size}is over the limit of {max_body_bytes} bytes"
    return HTTPException(413, reason, headers)
