"""What Serve's proxies do beyond Serve, on a server of the same kind (uvicorn) with a small application behind it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import httpx
import pytest
import uvicorn
from ray.serve._private.http_util import parse_disconnect_disabled_header, parse_request_timeout_header
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from gptj_serve.environment import DEFAULT_SLOW_CLIENT_TIMEOUT_S, SLOW_CLIENT_TIMEOUT_S, slow_client_timeout_s
from gptj_serve.errors import ConfigError
from gptj_serve.serving.proxy import middlewares

PIECE = b"x" * 65536
FAR_TOO_MUCH = 256 << 20  # more than any kernel buffers for a connection


class App:
    """Streams without end at /stream, answers with very much at /whole, with little at / and with the headers that it
    got at /headers, and is lost at others."""

    def __init__(self) -> None:
        self.num_sent = 0
        self.stream_has_ended = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/":
            await PlainTextResponse("here")(scope, receive, send)
        elif scope["path"] == "/whole":
            await PlainTextResponse(bytes(FAR_TOO_MUCH))(scope, receive, send)
        elif scope["path"] == "/headers":
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            await JSONResponse(headers)(scope, receive, send)
        elif scope["path"] == "/stream":
            try:
                await StreamingResponse(self._pieces())(scope, receive, send)
            finally:
                self.stream_has_ended.set()

    async def _pieces(self) -> AsyncIterator[bytes]:
        while True:
            self.num_sent += 1
            yield PIECE
            await asyncio.sleep(0)


@asynccontextmanager
async def serving(app: App) -> AsyncIterator[int]:
    """The port of a server that is set up as Serve sets up its own."""
    guarded: ASGIApp = app
    for middleware in middlewares():
        guarded = middleware.cls(guarded, *middleware.args, **middleware.kwargs)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(guarded, lifespan="off", log_level="critical", access_log=False))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            await task


@asynccontextmanager
async def reader_of(port: int, path: str) -> AsyncIterator[socket.socket]:
    """A client that has asked, and reads nothing by itself."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
        yield client


@pytest.fixture(autouse=True)
def _short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SLOW_CLIENT_TIMEOUT_S, "0.5")


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.02)


async def test_a_client_who_does_not_read_its_stream_is_cut_off() -> None:
    """And nobody else is."""
    app = App()
    async with serving(app) as port, reader_of(port, "/stream"), httpx.AsyncClient() as http:
        await asyncio.wait_for(app.stream_has_ended.wait(), 10)
        assert app.num_sent * len(PIECE) < FAR_TOO_MUCH
        assert (await http.get(f"http://127.0.0.1:{port}/")).text == "here"


async def test_a_client_who_reads_slowly_but_steadily_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that is put forward each time that nothing more can be sent."""
    timeout_s, ahead_s = 60.0, 0.0
    monkeypatch.setenv(SLOW_CLIENT_TIMEOUT_S, str(timeout_s))
    app = App()
    loop = asyncio.get_running_loop()
    true_time = loop.time
    monkeypatch.setattr(loop, "time", lambda: true_time() + ahead_s)
    async with serving(app) as port, reader_of(port, "/stream") as client:
        for _ in range(10):
            num_sent = -1
            while num_sent < app.num_sent or app.num_sent == 0:
                num_sent = app.num_sent
                await asyncio.sleep(0.1)
            ahead_s += 0.6 * timeout_s
            await asyncio.sleep(0.1)
            while app.num_sent == num_sent:
                assert await loop.sock_recv(client, 1 << 20), "cut off"
        assert not app.stream_has_ended.is_set()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux has a time-out for what is in flight")
async def test_what_is_left_of_a_whole_answer_is_dropped_by_the_kernel() -> None:
    app = App()
    async with serving(app) as port, reader_of(port, "/whole") as client:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(2.5)  # the kernel looks at it with growing pauses
        num_read = 0
        with suppress(ConnectionError):
            while piece := await asyncio.wait_for(loop.sock_recv(client, 1 << 20), 10):
                num_read += len(piece)
        assert 0 < num_read < FAR_TOO_MUCH


async def test_clients_have_no_say_in_what_serve_does_with_their_requests() -> None:
    """Serve's own code reads the headers here."""
    headers = {"X-Request-Disconnect-Disabled": "?1", "X-Request-Timeout-Seconds": "0.01", "X-Request-Timeout": "5"}
    sent = {name.lower().encode(): value.encode() for name, value in headers.items()}
    assert (parse_disconnect_disabled_header(sent), parse_request_timeout_header(sent, None)) == (True, 0.01)
    async with serving(App()) as port, httpx.AsyncClient() as http:
        answer = (await http.get(f"http://127.0.0.1:{port}/headers", headers=headers)).json()
    got = {name.encode(): value.encode() for name, value in answer.items()}
    assert (parse_disconnect_disabled_header(got), parse_request_timeout_header(got, None)) == (False, None)
    assert got[b"x-request-timeout"] == b"5"


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_an_answer_that_never_began_is_an_error_in_the_shape_of_its_route(path: str) -> None:
    message = "the process that was answering this request was lost; send it again"
    async with serving(App()) as port, httpx.AsyncClient() as http:
        response = await http.post(f"http://127.0.0.1:{port}{path}", json={})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    if path == "/generate":
        assert response.json() == {"error": message, "error_type": "overloaded"}
    else:
        error = {"message": message, "type": "overloaded_error", "param": None, "code": None}
        assert response.json() == {"error": error}


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_what_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(SLOW_CLIENT_TIMEOUT_S, text)
    with pytest.raises(ConfigError, match=f"{SLOW_CLIENT_TIMEOUT_S}='{text}'"):
        middlewares()


def test_the_default_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SLOW_CLIENT_TIMEOUT_S)
    assert slow_client_timeout_s() == DEFAULT_SLOW_CLIENT_TIMEOUT_S == 60
