"""Server-sent events: from async streams of JSON objects to an HTTP response."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar

import msgspec
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gptj_serve.api.errors import INTERNAL_ERROR, ErrorBody
from gptj_serve.api.request_context import current_request
from gptj_serve.api.resumption import AnswerStream
from gptj_serve.errors import GPTJServeError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter: nginx must not hold events back


async def event_stream(
    events: AsyncGenerator[Mapping[str, object]],
    answer: AnswerStream,
    error_body: ErrorBody,
    end_marker: str | None = None,
) -> StreamingResponse:
    """Send each object as one event, with the id that `answer` has for it.

    The first one is awaited here, so that a request that fails before it gets an ordinary error response; a later
    failure becomes a last event with the error object. That has no id: the stream can be taken up before it.
    """
    first = await anext(events, None)
    encoded_first = None if first is None else _encode(first, answer.event_id)

    async def encoded() -> AsyncGenerator[bytes]:
        try:
            if encoded_first is not None:
                yield encoded_first
            async for event in events:
                yield _encode(event, answer.event_id)
        except GPTJServeError as error:
            yield _encode(error_body(error))
            return
        except Exception as error:
            record = current_request().record
            record.fail(error)
            request_id = record.request_id
            logger.exception(
                "the events of request %s ended with an unexpected error", request_id, extra={"request_id": request_id}
            )
            yield _encode(error_body(INTERNAL_ERROR))
            return
        if end_marker is not None and answer.closes():
            yield _event(end_marker.encode(), answer.event_id)

    return _EventStreamResponse(events, encoded())


class _EventStreamResponse(StreamingResponse):
    """Closes its events when it is done, whether the client stayed or left: that is what aborts the request.

    Left to the garbage collector, it would happen at some later time.
    """

    def __init__(self, events: AsyncGenerator[Mapping[str, object]], encoded: AsyncGenerator[bytes]) -> None:
        super().__init__(encoded, media_type="text/event-stream", headers=_HEADERS)
        self._events = events
        self._encoded = encoded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events), aclosing(self._encoded):
            await super().__call__(scope, receive, send)


async def merged(streams: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[tuple[int, Item]]:
    """Items of several streams with their stream's index, as they come. If one fails, the others are closed."""
    queue: asyncio.Queue[tuple[int, Item | BaseException | None]] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int, stream: AsyncGenerator[Item]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put((index, item))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(streams)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _encode(body: Mapping[str, object], event_id: str | None = None) -> bytes:
    return _event(msgspec.json.encode(body), event_id)


def _event(data: bytes, event_id: str | None) -> bytes:
    """`data` is one line, as the encoder's JSON always is."""
    return b"data: %b\n\n" % data if event_id is None else b"data: %b\nid: %b\n\n" % (data, event_id.encode())
