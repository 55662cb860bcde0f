"""How benchmarks start and stop what they measure, here a server that stands for `serve run`."""

import asyncio
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from benchmarks.serve_run import http_stream, running

SERVER = """
import http.server, os, pathlib, signal, subprocess, sys
how, port, pids = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])

class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass

if how == "dies":  # what it started answers in its place
    others = subprocess.Popen([sys.executable, __file__, "stubborn", sys.argv[2], sys.argv[3]])
    while not pids.exists(): pass
    sys.exit("the server is gone")
if how == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    daemon = subprocess.Popen(["sleep", "600"], process_group=0)
    server = http.server.HTTPServer(("127.0.0.1", port), Models)
    pids.with_suffix(".new").write_text(f"{os.getpid()} {daemon.pid}")
    pids.with_suffix(".new").rename(pids)
else:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell ignore it
    server = http.server.HTTPServer(("127.0.0.1", port), Models)
try:
    server.serve_forever()
except KeyboardInterrupt:
    pids.write_text("interrupted")
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


@pytest.fixture
def command(tmp_path: Path, port: int):
    (tmp_path / "server.py").write_text(SERVER)
    return lambda how: [sys.executable, str(tmp_path / "server.py"), how, str(port), str(tmp_path / "pids")]


def are_gone(pids: list[int]) -> bool:
    def is_running(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # whose parent has yet to look
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_running, pids))


def test_it_is_interrupted_at_the_end(command, port: int, tmp_path: Path):
    with running(command("obliging"), tmp_path / "log", port) as process:
        assert process.poll() is None
    assert process.returncode == 0
    assert (tmp_path / "pids").read_text() == "interrupted"


def test_another_service_on_the_port_is_not_measured(command, port: int, tmp_path: Path):
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(SystemExit, match=f"127.0.0.1:{port} already"),
        running(command("obliging"), tmp_path / "log", port),
    ):
        pytest.fail("another was taken for ours")
    assert not (tmp_path / "log").exists(), "it was started"


def test_who_answers_when_ours_is_dead_is_not_measured(command, port: int, tmp_path: Path):
    with pytest.raises(SystemExit, match="the server is gone"), running(command("dies"), tmp_path / "log", port):
        pytest.fail("another was taken for ours")
    assert are_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


def test_who_does_not_stop_is_killed_with_its_daemons(command, port: int, tmp_path: Path):
    with running(command("stubborn"), tmp_path / "log", port, stop_timeout_s=0.5):
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert are_gone(pids)


EVENT = b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"text":"b","finish_reason":"length"}]}\n\n'
DONE = b"data: [DONE]\nid: 1-2\n\n"
ERROR = b'data: {"error":{"message":"a stage was lost"}}\n\n'


async def streamed(status: str, chunks: Sequence[bytes]) -> int:
    """How many events `http_stream` makes of a server's answer."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b'"return_token_ids": true}')
        writer.write(f"HTTP/1.1 {status}\r\n\r\n".encode())
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return sum([chunk.count(b"data: {") async for chunk in http_stream([1, 2], 3, port)])


@pytest.mark.parametrize("chunks", [(EVENT, EVENT, LAST, DONE), (EVENT, EVENT, LAST + DONE[:7], DONE[7:])])
async def test_events_of_a_whole_stream(chunks: Sequence[bytes]):
    assert await streamed("200 OK", chunks) == 3


@pytest.mark.parametrize(
    ("status", "chunks", "message"),
    [
        ("503 Service Unavailable", [ERROR], "503 Service Unavailable .*a stage was lost"),
        ("200 OK", [EVENT, ERROR], "before its 3 tokens had come: .*a stage was lost"),
        ("200 OK", [EVENT, LAST], "before its 3 tokens had come"),  # the connection was cut
        ("200 OK", [EVENT, LAST.replace(b"length", b"stop"), DONE], "before its 3 tokens had come"),
        ("200 OK", [], "before its 3 tokens had come"),
    ],
)
async def test_a_stream_that_ends_early_is_not_measured(status: str, chunks: Sequence[bytes], message: str):
    with pytest.raises(ConnectionError, match=f"(?s){message}"):
        await streamed(status, chunks)
