"""A `serve run` process, started and stopped as a user does it in a terminal."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import httpx
import psutil

ROOT = Path(__file__).parents[2]
SERVE = Path(sys.executable).parent / "serve"
URL = "http://127.0.0.1:8000"
STARTUP_TIMEOUT_S = 120
LOG_FORWARDING_S = 1.5  # Ray shows what its processes print with a delay


class ServeRun:
    """`serve run <config>`, with `environment` on top of this process's; `output` is what the terminal showed so far,
    without colours."""

    def __init__(self, config: Path, log_file: Path, port: int = 8000, **environment: str) -> None:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} is taken by another service"
        self.config = config
        self.startup_output = ""
        self.url = f"http://127.0.0.1:{port}"
        self._log_file = log_file
        self.started_at = time.monotonic()
        with log_file.open("w") as log:
            self.process = subprocess.Popen(
                [SERVE, "run", config],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
                # A shell gives background jobs an ignored SIGINT; Ctrl-C in a terminal meets the default.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            )

    @property
    def output(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self._log_file.read_text())

    def wait_until_ready(self, route_prefixes: Sequence[str] = ("",)) -> Self:
        """Until each application has generated."""
        waiting = list(route_prefixes)
        while time.monotonic() - self.started_at < STARTUP_TIMEOUT_S:
            assert self.process.poll() is None, f"serve run ended:\n{self.output}"
            try:
                url = f"{self.url}{waiting[0]}/generate"
                response = httpx.post(url, json={"inputs": "Hello"}, timeout=STARTUP_TIMEOUT_S)
                if response.status_code == 200:
                    waiting.pop(0)
                if not waiting:
                    time.sleep(LOG_FORWARDING_S)
                    self.startup_output = self.output
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after {STARTUP_TIMEOUT_S} s:\n{self.output}")

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def interrupt(self, timeout_s: float = 60) -> float:
        """Ctrl-C; returns after how many seconds the command had ended."""
        started_at = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout_s)
        return time.monotonic() - started_at


async def eventually(check, timeout_s: float = 20.0) -> None:
    """Wait until the async `check()` is true."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not await check():
        assert asyncio.get_running_loop().time() < deadline, f"not within {timeout_s} s: {check.__doc__}"
        await asyncio.sleep(0.02)
