"""The request's headers that every route understands, and the time that a request has.

| header            | value                                        | without it                          |
|-------------------|----------------------------------------------|-------------------------------------|
| X-Request-ID      | 1 to 128 printable ASCII characters, no blank | an id is made; the answer has it too |
| X-Priority        | integer, -1000 to 1000; lower is sooner      | 0; a body's own `priority` goes first |
| X-Request-Timeout | seconds > 0; at most `request_timeout_s`     | `request_timeout_s`                 |
| X-Session-Id      | 1 to 128 printable ASCII characters, no blank | it is of no session                 |
"""

import asyncio
import logging
import math
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj_serve.api.errors import INTERNAL_ERROR, error_response, http_error_response
from gptj_serve.api.request_context import RequestContext, answering, new_request_id
from gptj_serve.errors import InvalidRequestError
from gptj_serve.types import MAX_PRIORITY

logger = logging.getLogger(__name__)

REQUEST_ID = "X-Request-ID"
PRIORITY = "X-Priority"
TIMEOUT = "X-Request-Timeout"
SESSION_ID = "X-Session-Id"  # by which Serve's proxy knows a session too

_ID = re.compile(r"[!-~]{1,128}")
_ID_FORM = "must be 1 to 128 printable ASCII characters, no blanks"
_PRIORITY = re.compile(r"[+-]?[0-9]{1,4}")
_TIMEOUT = re.compile(r"[0-9.]+([eE][+-]?[0-9]{1,3})?")

MARGIN_S = 0.05
"""What waits for the engine is ended by `Service.events`; of two timers at once each could take the other's effect."""

LAST_WORDS_S = 5.0
"""After its deadline a stream has this long to say so; a client that takes nothing then holds nothing longer."""


class RequestHeaders:
    """ASGI middleware: what is inside answers `current_request()`, within that request's time.

    With `echoes_request_id` the response gets its `X-Request-ID`; without, somebody in front of this sets it.
    """

    def __init__(self, app: ASGIApp, *, request_timeout_s: float | None, echoes_request_id: bool) -> None:
        self._app = app
        self._request_timeout_s = request_timeout_s
        self._echoes_request_id = echoes_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            context = self._context(Headers(scope=scope))
        except InvalidRequestError as error:
            refusal = HTTPException(400, str(error))
            response = http_error_response(Request(scope), refusal)
            await response(scope, receive, self._with_headers(send, new_request_id()))
            return
        with answering(context):
            await self._answer(scope, receive, self._with_headers(send, context.request_id), context)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, context: RequestContext) -> None:
        """Before its first byte, an answer that takes too long or fails unexpectedly becomes an error response.

        Later the time is the stream's own matter: `Service.events` ends it, and an error event tells why.
        """
        has_started = False

        async def started(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if (when := timer.when()) is not None and not timer.expired():
                    timer.reschedule(when + LAST_WORDS_S)
            await send(message)

        timer = asyncio.timeout(None if context.deadline is None else context.deadline - time.monotonic() + MARGIN_S)
        response: Response
        try:
            async with timer:
                await self._app(scope, receive, started)
            return
        except Exception as error:
            is_late = timer.expired() and isinstance(error, TimeoutError)
            if is_late and has_started:
                logger.warning("request %s: its client took nothing more, and was left", context.request_id)
                return
            if has_started:
                raise
            response = error_response(Request(scope), context.out_of_time() if is_late else INTERNAL_ERROR)
            if not is_late:
                await response(scope, receive, send)  # here, not outside, so that it gets the headers of all others
                raise  # the server logs it
        await response(scope, receive, send)

    def _context(self, headers: Headers) -> RequestContext:
        request_id = _only(headers, REQUEST_ID)
        if request_id is not None and not _ID.fullmatch(request_id):
            raise InvalidRequestError(REQUEST_ID, request_id, _ID_FORM)
        session_id = _only(headers, SESSION_ID)
        priority = _only(headers, PRIORITY)
        if priority is not None and (not _PRIORITY.fullmatch(priority) or abs(int(priority)) > MAX_PRIORITY):
            raise InvalidRequestError(PRIORITY, priority, f"must be an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}")
        now = time.monotonic()
        limits = [limit for limit in (_timeout_s(headers), self._request_timeout_s) if limit is not None]
        return RequestContext(
            request_id=request_id if request_id is not None else new_request_id(),
            arrived_at=now,
            deadline=now + min(limits) if limits else None,
            priority=int(priority or 0),
            session_id=checked_session_id(SESSION_ID, session_id) if session_id is not None else "",
        )

    def _with_headers(self, send: Send, request_id: str) -> Send:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                if self._echoes_request_id:
                    headers[REQUEST_ID] = request_id
            await send(message)

        return send_with_headers


def checked_session_id(field: str, session_id: str) -> str:
    """Raises `InvalidRequestError` if it is none."""
    if not _ID.fullmatch(session_id):
        raise InvalidRequestError(field, session_id, _ID_FORM)
    return session_id


def _timeout_s(headers: Headers) -> float | None:
    value = _only(headers, TIMEOUT)
    if value is None:
        return None
    try:
        seconds = float(value) if _TIMEOUT.fullmatch(value) else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:  # also if it is no number
        raise InvalidRequestError(TIMEOUT, value, "must be a number of seconds above 0")
    return seconds


def _only(headers: Headers, name: str) -> str | None:
    values = headers.getlist(name)
    if len(values) > 1:
        raise InvalidRequestError(name, ", ".join(values), "must be sent once")
    return values[0] if values else None
