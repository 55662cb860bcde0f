"""Server-sent events: from async streams of JSON objects to an HTTP response."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

from gptj_serve.api.errors import ErrorBody
from gptj_serve.errors import GPTJServeError

Item = TypeVar("Item")

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter: nginx must not hold events back


async def event_stream(
    events: AsyncGenerator[dict[str, Any]], error_body: ErrorBody, end_marker: str | None = None
) -> StreamingResponse:
    """Send each object as one event.

    The first one is awaited here, so that a request that fails before it gets an ordinary error response; a later
    failure becomes a last event with the error object.
    """
    first = await anext(events, None)

    async def encoded() -> AsyncIterator[bytes]:
        async with aclosing(events):
            try:
                if first is not None:
                    yield _encode(first)
                async for event in events:
                    yield _encode(event)
            except GPTJServeError as error:
                yield _encode(error_body(error))
                return
            if end_marker is not None:
                yield format_sse_event(data_str=end_marker)

    return StreamingResponse(encoded(), media_type="text/event-stream", headers=_HEADERS)


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


def _encode(body: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=msgspec.json.encode(body).decode())
