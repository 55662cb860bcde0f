"""`serve run` of the service, and its streams over HTTP as bytes, so that the client costs little."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.random_model import M405, make_checkpoint

HOST, PORT = "127.0.0.1", 8000
MODEL_NAME = "benchmark"
STARTUP_TIMEOUT_S = 240
STOP_TIMEOUT_S = 60
NUM_LAST_BYTES = 4096  # of a stream: its last event and the mark behind it
END_MARKS = (b'"finish_reason":"length"', b"data: [DONE]")
"""Of a stream that has all tokens that were asked for; one that fails ends with an error and without a mark."""


def make_model(tokenizer: Path, work: Path) -> Path:
    """A random model of 405 M parameters with the tokenizer of that directory."""
    directory = work / "405m"
    directory.mkdir()
    make_checkpoint(M405, directory)
    shutil.copy(tokenizer / "tokenizer.json", directory)
    return directory


async def http_stream(prompt: Sequence[int], num_tokens: int, port: int = PORT) -> AsyncGenerator[bytes]:
    """Chunks of a streamed completion's body, each with an event or several.

    Raises `ConnectionError` if it is refused, or ends without all tokens.
    """
    body = {
        "model": MODEL_NAME,
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        status, *_ = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        if b" 200 " not in status:
            raise ConnectionError((status + b" " + await reader.read()).decode())
        last = b""
        while chunk := await reader.read(65536):
            last = (last + chunk)[-NUM_LAST_BYTES:]
            if b"data: " in chunk:
                yield chunk
        if not all(mark in last for mark in END_MARKS):
            raise ConnectionError(f"a stream ended before its {num_tokens} tokens had come: {last.decode()}")
    finally:
        writer.close()


@contextlib.contextmanager
def running_service(directory: Path, num_stages: int, work: Path, **pipeline: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The service on port 8000, ready; stopped at the end."""
    args = {
        "checkpoint": str(directory),
        "model_name": MODEL_NAME,
        "pipeline": {"num_stages": num_stages, "stage": {"num_cpus": 0.4}} | pipeline,
    }
    application = {"name": "gptj", "route_prefix": "/", "import_path": "gptj_serve.serving.app:build", "args": args}
    config = {"http_options": {"host": HOST, "port": PORT}, "applications": [application]}
    (work / "service.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).parent / "serve"), "run", str(work / "service.yaml")]
    with running(command, work / "service.log") as process:
        yield process


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, port: int = PORT, stop_timeout_s: float = STOP_TIMEOUT_S
) -> Iterator[subprocess.Popen[bytes]]:
    """A command that serves on a port that nobody else has, once it is ready; at the end it is interrupted.

    Ends the program if the port is taken, or if the command ends or isn't ready in time. What is left of the command's
    session at the end is killed: Ray's daemons are in it.
    """
    if is_taken(port):
        raise SystemExit(f"something listens on {HOST}:{port} already, and it would be measured: stop it first")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        while not is_ready(port) or process.poll() is not None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(log.read_text())
            time.sleep(0.5)
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(stop_timeout_s)
        kill_session(process.pid)
        process.wait()


def kill_session(session_id: int) -> None:
    """Process groups of their own don't save those who were started in it."""
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == session_id:
                os.kill(pid, signal.SIGKILL)


def is_taken(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex((HOST, port)) == 0


def is_ready(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://{HOST}:{port}/v1/models").status_code == 200
    return False
