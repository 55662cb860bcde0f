"""`Door`: who is let in to the routes. What it refuses costs next to nothing: no body is read for it."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj_serve.api.door.accounts import Accounts, KeyAccount
from gptj_serve.api.door.body import ClientLeftError, check_declared_size, read_body
from gptj_serve.api.door.key_ring import KeyRing, matching
from gptj_serve.api.door.ongoing import OngoingRequests
from gptj_serve.api.errors import error_response, http_error_response
from gptj_serve.api.request_context import answering, current_request
from gptj_serve.api.route_path import route_path
from gptj_serve.config import IngressConfig
from gptj_serve.errors import GPTJServeError, UnauthorizedError
from gptj_serve.queue_wait import check_wait

DOCS_ASSETS = "/docs-assets"
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/docs", "/openapi.json"})
"""Need no key: they say nothing of anybody's requests."""

LOOKING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""What only looks is not limited, so that an operator sees a service that is full."""


UNQUEUED_PATHS = frozenset({"/tokenize", "/detokenize"})
"""Need no pipeline."""


class Door:
    """ASGI middleware, inside `RequestHeaders`: API key, the key's limits, room, the queue, the body's limits.

    In this order. What is let in counts until its answer has ended, however it ends. Where the queue is too long, the
    header alone says who goes before others all the same: to refuse costs half as much before the body is read.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        config: IngressConfig,
        keys: KeyRing,
        ongoing: OngoingRequests,
        queue_wait_s: Callable[[], float],
        max_queue_wait_s: float | None,
    ) -> None:
        """`queue_wait_s` says how long a request of priority 0 would wait for its turn."""
        self._app = app
        self._queue_wait_s = queue_wait_s
        self._max_queue_wait_s = max_queue_wait_s
        self._config = config
        self._keys = keys
        self._ongoing = ongoing
        self._accounts = Accounts(config.num_replicas)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal: Response
        context = current_request()
        account: KeyAccount | None = None
        with ExitStack() as held:
            try:
                account = self._account(scope)
                context.record.api_key = None if account is None else account.name
                if scope["method"] not in LOOKING_METHODS:
                    if account is not None:
                        held.enter_context(account.request())
                    held.enter_context(self._ongoing.request())
                    if context.priority >= 0 and route_path(scope) not in UNQUEUED_PATHS:
                        check_wait(self._queue_wait_s(), self._max_queue_wait_s, context.time_left_s)
                    check_declared_size(scope, self._config.max_body_bytes)
                    receive = await read_body(receive, self._config.max_body_bytes, self._config.body_timeout_s)
                    send = send if account is None else _with_limits(send, account)
            except ClientLeftError:
                return
            except GPTJServeError as error:
                refusal = error_response(Request(scope), error)
            except HTTPException as error:
                refusal = http_error_response(Request(scope), error)
            else:
                with answering(replace(context, account=account)):
                    await self._app(scope, receive, send)
                return
        await refusal(scope, receive, send if account is None else _with_limits(send, account))

    def _account(self, scope: Scope) -> KeyAccount | None:
        """Of the key that the request came with; None where none is needed. Raises `UnauthorizedError`."""
        keys = self._keys.current()
        if not keys or scope["method"] == "OPTIONS" or _is_open(route_path(scope)):
            return None
        presented = _presented_key(Headers(scope=scope))
        if presented is None:
            raise UnauthorizedError("an API key is needed: Authorization: Bearer <key>, or X-API-Key: <key>")
        key = matching(presented, keys)
        if key is None:
            raise UnauthorizedError("the API key is not valid")
        return self._accounts.of(key)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(f"{DOCS_ASSETS}/")


def _presented_key(headers: Headers) -> bytes | None:
    """X-API-Key goes first: Authorization may be meant for a proxy on the way."""
    key = headers.get("x-api-key")
    if key is None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
    return key.strip().encode("latin-1") or None


def _with_limits(send: Send, account: KeyAccount) -> Send:
    async def send_with_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(account.headers())
        await send(message)

    return send_with_limits
