"""`Trial`: a grammar is compiled in another process first, which may hang, crash or run out of memory in peace."""

import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection

import msgspec

from gptj_serve.errors import RequestFailedError
from gptj_serve.grammar import library

WALL_LIMIT_S = 60.0
"""Only for a process that gets no CPU; one that does is ended by its own limit."""


class Trial:
    """Runs `library.main` in a process that is started when it is first needed, and again after it was ended.

    It ends with this object, or when this process does. Not for several threads at once.
    """

    def __init__(self, tokens: Sequence[bytes], eos_token_ids: Sequence[int]) -> None:
        self._vocabulary = msgspec.msgpack.encode((tokens, eos_token_ids))
        self._process: _Process | None = None

    def complaint(self, source: str) -> str:
        """What is wrong with a grammar, if anything. Raises `RequestFailedError` if it can't be tried out at all."""
        if self._process is None:
            process = _Process()
            if process.ask(self._vocabulary) is None:
                raise RequestFailedError(f"the process that tries grammars out ended with status {process.end()}")
            self._process = process
        answer = self._process.ask(source.encode())
        if answer is not None:
            return answer.decode()
        self._process.end()
        self._process = None
        return f"it is too deep or too large to be compiled within {library.CPU_LIMIT_S} s"


class _Process:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # -P: this file's directory is not one to import from.
            self._process = subprocess.Popen(  # noqa: S603 (this interpreter, on a file of this package)
                [sys.executable, "-P", library.__file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for us
            )
        self._connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, self._process, self._connection)

    def ask(self, message: bytes) -> bytes | None:
        """The answer; None if the process ended instead, or takes for ever."""
        try:
            self._connection.send_bytes(message)
            return self._connection.recv_bytes() if self._connection.poll(WALL_LIMIT_S) else None
        except (EOFError, ConnectionError):
            return None

    def end(self) -> int:
        """Returns the exit status, negative for a signal."""
        status = self._end()
        assert status is not None, "a process ends once"
        return int(status)


def _end(process: subprocess.Popen[bytes], connection: Connection) -> int:
    connection.close()
    process.kill()
    return process.wait()
