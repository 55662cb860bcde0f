"""`Host`: one machine of a testbed, from outside."""

import ctypes
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 20.0
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


class Host:
    """Starts at once; `tap` is the file descriptor of its interface's other end. `kill` it, or end this process."""

    def __init__(self, name: str, port: int, address: str, mtu: int) -> None:
        self.name = name
        self.port = port
        self.address = address
        self._control, theirs = socket.socketpair()
        with theirs:
            self._parent = subprocess.Popen(
                [
                    *(sys.executable, "-m", "cluster.testbed.host_init"),
                    *(str(theirs.fileno()), str(port), address, str(mtu)),
                ],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the testbed, which then ends its hosts
            )
        self._commands: list[subprocess.Popen[str]] = []
        self.is_alive = True

    def wait_until_up(self) -> int:
        """Returns the file descriptor of the other end of its interface. Raises `RuntimeError` if it does not start."""
        self._control.settimeout(START_TIMEOUT_S)
        message, descriptors, _, _ = socket.recv_fds(self._control, 16, 1)
        if message != b"up":
            raise RuntimeError(f"{self.name} did not start: see its error above")
        return descriptors[0]

    @property
    def init(self) -> psutil.Process:
        """Its process 1."""
        (init,) = psutil.Process(self._parent.pid).children()
        return init

    def processes(self) -> list[psutil.Process]:
        """All that run on it, but for its process 1."""
        if not self.is_alive:
            return []
        namespace = os.readlink(f"/proc/{self.init.pid}/ns/pid")
        return [p for p in psutil.process_iter() if _namespace_of(p) == namespace and p.pid != self.init.pid]

    def popen(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, output: IO[Any] | int | None = None
    ) -> "subprocess.Popen[str]":
        """Start a command on it. Its temporary files are its own; the rest of the file system is shared.

        Raises `RuntimeError` if it was killed.
        """
        if not self.is_alive:
            raise RuntimeError(f"{self.name} was killed")
        within = ("nsenter", f"--target={self.init.pid}", "--net", "--mount", "--pid", f"--wd={ROOT}")
        process = subprocess.Popen(
            [*within, *command],
            env={**os.environ, "TMPDIR": "/dev/shm", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            text=True,
            start_new_session=True,
        )
        self._commands.append(process)
        return process

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None = None, timeout_s: float = 120) -> str:
        """What the command printed. Raises `RuntimeError` with it if the command fails."""
        with self.popen(command, environment, subprocess.PIPE) as process:
            try:
                printed, _ = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} on {self.name} ended with {process.returncode}:\n{printed}")
        return printed

    @contextmanager
    def network(self) -> Iterator[None]:
        """Sockets that this thread makes meanwhile are this host's, and stay so."""
        with open("/proc/thread-self/ns/net") as own, open(f"/proc/{self.init.pid}/ns/net") as other:
            thread = threading.get_ident()
            _set_network(other.fileno())
            try:
                yield
            finally:
                assert thread == threading.get_ident(), "left in another thread than it was entered in"
                _set_network(own.fileno())

    def kill(self) -> None:
        """As a power cut: all its processes at once. Who unplugs it first sees to it that it dies in silence."""
        self.is_alive = False
        if self._parent.poll() is None:
            for child in psutil.Process(self._parent.pid).children():
                child.kill()
        self._parent.wait(START_TIMEOUT_S)
        for command in self._commands:
            command.wait(START_TIMEOUT_S)
        self._control.close()


def _namespace_of(process: psutil.Process) -> str | None:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/pid")
    except OSError:
        return None  # it has ended


def _set_network(descriptor: int) -> None:
    if _LIBC.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
