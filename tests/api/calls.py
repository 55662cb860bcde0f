"""Two ways to look into a response: the events of a finished stream, and a call driven by hand. And a chat template."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Self

import httpx
from fastapi import FastAPI

TEXT = " jumps over the café — 東京."
CHAT_TEMPLATE = """\
{% for message in messages %}
{% if message.role == "developer" %}{{ raise_exception("only system, user, assistant") }}{% endif %}
{{ message.role[0] }}{{ "(" + message.name + ")" if message.name }}>{{ message.content }}{{ end or "|" }}
{%- endfor %}
{% if add_generation_prompt %}a>{% endif %}"""
"""A chat of one message, "Hi": u>Hi|a>"""


def events(response: httpx.Response) -> list[Any]:
    """The data of all server-sent events: JSON, or text where it is none."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.text.endswith("\n\n")
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    fields = [block.split("\n") for block in blocks]
    assert all([line.partition(": ")[0] for line in lines] in (["data"], ["data", "id"]) for lines in fields)
    return [json.loads(data) if data.startswith("{") else data for data in (lines[0][6:] for lines in fields)]


class Call:
    """One POST driven by hand, message by message, so that a test can hang up in the middle.

    `spec_version` is the ASGI server's: from 2.4 on, sending to a client who left raises `OSError`.
    With `stuck_after`, the client takes so many messages and then no more.
    """

    def __init__(
        self,
        app: FastAPI,
        path: str,
        body: Any,
        *,
        headers: Mapping[str, str] | None = None,
        spec_version: str = "2.3",
        stuck_after: int | None = None,
    ) -> None:
        self._spec_version = spec_version
        self._stuck_after = stuck_after
        self._body: bytes | None = json.dumps(body).encode()
        self._left = asyncio.Event()
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self._num_sent = 0
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"host", b"test"),
                (b"content-type", b"application/json"),
                *((name.lower().encode(), value.encode()) for name, value in (headers or {}).items()),
            ],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def chunks(self, count: int) -> list[bytes]:
        """Wait for the response's start and its first `count` chunks."""
        async with asyncio.timeout(5):
            start = await self._messages.get()
            assert start["status"] == 200
            return [(await self._messages.get())["body"] for _ in range(count)]

    async def hang_up(self) -> None:
        """Leave, and wait until the application has noticed."""
        self._left.set()
        async with asyncio.timeout(5):
            await asyncio.wait([self.task])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if self._num_sent == self._stuck_after:
            await self._left.wait()
        if self._left.is_set() and self._spec_version >= "2.4":
            raise OSError("the client has left")
        self._num_sent += 1
        self._messages.put_nowait(message)
