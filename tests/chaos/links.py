"""Links between processes, found and cut from outside: nothing in the service knows of it."""

import ctypes
import errno
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

PIDFD_GETFD = 438
"""The system call's number, on every architecture; it duplicates another process's file descriptor."""

_LIBC = ctypes.CDLL(None, use_errno=True)

_LINK_PATH = re.compile(r"ipc://.*/gptj_serve-\d+-[^/]+/\S+$")


@dataclass(frozen=True)
class Link:
    """A receiver's end: the one that bears the address that the receiver has bound."""

    pid: int
    file_descriptor: int
    address: str

    @property
    def name(self) -> str:
        """Of an ipc link, as 0-steps, 1-hidden, results."""
        return PurePath(self.address).name


def links_of(pids: Iterable[int]) -> list[Link]:
    """The links that stand between processes on this host, each once."""
    return [link for link in connections_of(pids) if _LINK_PATH.match(link.address)]


def connections_of(pids: Iterable[int]) -> list[Link]:
    """All connections of these processes, over Unix sockets with an address and over TCP."""
    found = []
    for pid in pids:
        try:
            numbers = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # it has just ended
        for number in map(int, numbers):
            address = _address(pid, number)
            if address is not None:
                found.append(Link(pid, number, address))
    return found


def cut(link: Link) -> bool:
    """End the connection under both its ends; False if the process or the link has ended before.

    Raises `PermissionError` where this process must not trace the other one.
    """
    if _address(link.pid, link.file_descriptor) != link.address:
        return False  # it is another thing by now
    end = _duplicate(link.pid, link.file_descriptor)
    if end is None:
        return False
    with end:
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                return False
            raise
    return True


def _address(pid: int, number: int) -> str | None:
    """None for what is no connection."""
    try:
        is_socket = os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:")
    except OSError:
        return None
    end = _duplicate(pid, number) if is_socket else None
    if end is None:
        return None
    with end:
        try:
            end.getpeername()
            name = end.getsockname()
        except OSError:  # it only listens
            return None
    if end.family == socket.AF_UNIX:
        return f"ipc://{name}" if name and isinstance(name, str) else None
    return f"tcp://{name[0]}:{name[1]}" if end.family in (socket.AF_INET, socket.AF_INET6) else None


def _duplicate(pid: int, number: int) -> socket.socket | None:
    """None if it is there no longer. This process's own needs no rights."""
    try:
        duplicate = os.dup(number) if pid == os.getpid() else _duplicate_of_other(pid, number)
    except OSError as error:
        if error.errno in (errno.EBADF, errno.ESRCH):
            return None
        raise
    try:
        return socket.socket(fileno=duplicate)
    except OSError:  # no socket by now
        os.close(duplicate)
        return None


def _duplicate_of_other(pid: int, number: int) -> int:
    process = os.pidfd_open(pid)
    try:
        duplicate: int = _LIBC.syscall(PIDFD_GETFD, process, number, 0)
        if duplicate < 0:
            raise OSError(ctypes.get_errno(), f"pidfd_getfd of process {pid}")
        return duplicate
    finally:
        os.close(process)
