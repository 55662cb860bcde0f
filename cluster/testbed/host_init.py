"""Process 1 of a host: it makes the host's interface, and ends with the testbed that started it.

It runs in network, mount and process namespaces of its own. The host is gone when it ends, whatever the reason:
the kernel then kills all of the host's processes, and nothing has a name that could be left behind.

It shares the machine's file system, but for /dev/shm: that is its own, for Ray's object store and all temporary files.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

from cluster.testbed.switch import mac_address

INTERFACE = "eth0"
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_CLONE_NEWNS, _CLONE_NEWPID, _CLONE_NEWNET = 0x00020000, 0x20000000, 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def main(control: int, port: int, address: str, mtu: int) -> None:
    """Sends the TAP device's file descriptor over `control`; the host then is there until the other end is closed."""
    if _LIBC.unshare(_CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    init = os.fork()  # the first child is process 1
    if init:
        os.close(control)
        os.waitpid(init, 0)
        return
    with socket.socket(fileno=control) as testbed:
        _run("mount", "--make-rprivate", "/")
        _run("mount", "-t", "proc", "proc", "/proc")
        _run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
        for setting in Path("/proc/sys/net/ipv6/conf").glob("*/disable_ipv6"):
            setting.write_text("1")
        # Not BBR: it sends by the round trip that it has seen in the last ten seconds, and here latencies change.
        Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text("reno")
        tap = open_tap(INTERFACE)
        mac = ":".join(f"{byte:02x}" for byte in mac_address(port))
        _run("ip", "link", "set", "lo", "up")
        _run("ip", "link", "set", INTERFACE, "address", mac, "mtu", str(mtu), "up")
        _run("ip", "address", "add", f"{address}/24", "dev", INTERFACE)
        socket.send_fds(testbed, [b"up"], [tap])
        os.close(tap)
        _stay_until_closed(testbed)


def open_tap(name: str) -> int:
    """A new TAP device in this process's network namespace, which goes with its last file descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    # Without IFF_VNET_HDR, so that the kernel completes checksums and segments before it hands over a frame.
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return descriptor


def _stay_until_closed(testbed: socket.socket) -> None:
    """Process 1 inherits all orphans, and has to ask for their ends."""
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    while True:
        readable, _, _ = select.select([testbed.fileno(), wake], [], [])
        if testbed.fileno() in readable:
            return
        os.read(wake, 4096)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
