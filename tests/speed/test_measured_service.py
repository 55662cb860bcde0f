"""How benchmarks start and stop what they measure, here a server that stands for `serve run`."""

import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.serve_run import running

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
