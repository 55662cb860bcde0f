"""Keeps a record of each request while it is answered, whoever asks: `recording`, and `RecordRequests` for HTTP."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj_serve.api.errors import error_message
from gptj_serve.api.request_context import answering, current_request
from gptj_serve.api.request_record import MAX_ERROR_CHARACTERS, NoObserver, Observer, Outcome, RequestRecord, outcome_of
from gptj_serve.api.route_path import route_path


class RequestLog:
    """All its records tell one observer."""

    def __init__(self, observer: Observer | None = None) -> None:
        self._observer = observer or NoObserver()

    @contextmanager
    def recording(self, route: str) -> Iterator[RequestRecord]:
        """All that is done inside is noted of `current_request()`, which ends in full, with an error or cancelled."""
        context = current_request()
        record = RequestRecord(route, context.request_id, context.arrived_at, self._observer)
        with answering(replace(context, record=record)):
            try:
                yield record
            except Exception as error:
                record.fail(error)
                raise
            except BaseException:
                if context.is_late:  # then it is the deadline that cancels, from outside
                    record.fail(context.out_of_time())
                else:
                    record.outcome = record.outcome or Outcome.ABORTED
                raise
            finally:
                record.end()


class RecordRequests:
    """ASGI middleware: a record for each HTTP request that is sent with POST, since all others ask for no task."""

    def __init__(self, app: ASGIApp, log: RequestLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        status, is_complete = 0, False

        async def watch(message: Message) -> None:
            nonlocal status, is_complete
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                is_complete = not message.get("more_body", False)
                if status >= 400:
                    told = error_message(message.get("body", b""))
                    record.error = record.error or (told and told[:MAX_ERROR_CHARACTERS])

        with self._log.recording(f"POST {route_path(scope)}") as record:
            await self._app(scope, receive, watch)
            if not is_complete:
                record.outcome = record.outcome or Outcome.ABORTED
            elif status >= 400:
                record.outcome = record.outcome or outcome_of(status)
        return None
