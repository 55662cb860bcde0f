"""Links between processes, found and cut from outside: nothing in the service knows of it."""

import ctypes
import errno
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PIDFD_GETFD = 438
"""The system call's number, on every architecture; it duplicates another process's file descriptor."""

CONNECTED = "03"

_LIBC = ctypes.CDLL(None, use_errno=True)

_LINK_PATH = re.compile(r"/gptj_serve-\d+-[^/]+/(\S+)$")


@dataclass(frozen=True)
class Link:
    """A receiver's end: the one that bears the socket file's name."""

    pid: int
    file_descriptor: int
    name: str  # as 0-steps, 1-hidden, results


def links_of(pids: Iterable[int]) -> list[Link]:
    """The links that stand between processes on this host, each once."""
    names = _connected_inodes()
    links = []
    for pid in pids:
        try:
            numbers = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # it has just ended
        for number in numbers:
            try:
                target = os.readlink(f"/proc/{pid}/fd/{number}")
            except OSError:
                continue
            inode = target.removeprefix("socket:[").removesuffix("]")
            if inode in names:
                links.append(Link(pid, int(number), names[inode]))
    return links


def cut(link: Link) -> bool:
    """End the connection under both its ends; False if the process or the link has ended before.

    Raises `PermissionError` where this process must not trace the other one.
    """
    try:
        process = os.pidfd_open(link.pid)
    except ProcessLookupError:
        return False
    try:
        duplicate = _LIBC.syscall(PIDFD_GETFD, process, link.file_descriptor, 0)
        if duplicate < 0:
            if ctypes.get_errno() in (errno.EBADF, errno.ESRCH):
                return False
            raise OSError(ctypes.get_errno(), f"pidfd_getfd of process {link.pid}")
    finally:
        os.close(process)
    try:
        with socket.socket(fileno=duplicate) as end:
            end.shutdown(socket.SHUT_RDWR)
    except OSError as error:  # it is another thing by now
        if error.errno in (errno.ENOTCONN, errno.ENOTSOCK):
            return False
        raise
    return True


def _connected_inodes() -> dict[str, str]:
    """The names of the links that are connected, by inode."""
    names = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[5] == CONNECTED and (match := _LINK_PATH.search(fields[7])):
            names[fields[6]] = match[1]
    return names
