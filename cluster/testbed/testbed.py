"""`Testbed`: several hosts on one Linux machine, with links between them that can be slow, lossy or cut.

Each host is a set of unnamed namespaces, its interface a TAP device, and one process switches frames between them.
All of it lives as long as this process does: the kernel sees to that, also when it is killed.
"""

import itertools
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.testbed.host import ROOT, Host
from cluster.testbed.links import Command, Counters, Link

MTU = 9000
_NETWORK = "10.77.0"  # of every testbed: it is not to be reached from elsewhere, so they do not clash


def missing() -> str | None:
    """Why there can be no testbed here, or None."""
    if not sys.platform.startswith("linux"):
        return "it is made of Linux namespaces"
    if os.geteuid() != 0:
        return "only root may make network namespaces and TAP devices"
    for command in ("ip", "mount", "nsenter"):
        if shutil.which(command) is None:
            return f"there is no command {command} (Debian: iproute2, util-linux, mount)"
    return None if Path("/dev/net/tun").exists() else "there is no /dev/net/tun"


class Testbed:
    """`hosts` are up when it is entered, and gone when it is left. Another one, "client", is there to ask from.

    Latency is one way: a ping takes twice as long. The client's links are never slow.
    """

    __test__ = False  # for pytest, which collects what is called Test

    def __init__(self, num_hosts: int, mtu: int = MTU) -> None:
        """Raises `RuntimeError` where there can be no testbed."""
        if num_hosts < 1 or num_hosts > 200:
            raise ValueError(f"num_hosts={num_hosts}: must be between 1 and 200")
        if (reason := missing()) is not None:
            raise RuntimeError(f"no testbed: {reason}")
        self._num_hosts = num_hosts
        self._mtu = mtu
        self._links: dict[tuple[int, int], Link] = {}
        self._everyone: list[Host] = []
        self._switch: subprocess.Popen[bytes] | None = None
        self._control, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def __enter__(self) -> Self:
        taps: list[int] = []
        try:
            for port in range(self._num_hosts + 1):
                name = f"host {port}" if port < self._num_hosts else "client"
                self._everyone.append(Host(name, port, f"{_NETWORK}.{port + 1}", self._mtu))
            taps += [host.wait_until_up() for host in self._everyone]
            self._switch = subprocess.Popen(
                [sys.executable, "-m", "cluster.testbed.switch", *map(str, [self._theirs.fileno(), *taps])],
                cwd=ROOT,
                pass_fds=[self._theirs.fileno(), *taps],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            self.counters()  # it is there
        except BaseException:
            self.close()
            raise
        finally:
            self._theirs.close()
            for tap in taps:
                os.close(tap)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def hosts(self) -> list[Host]:
        return self._everyone[:-1]

    @property
    def client(self) -> Host:
        return self._everyone[-1]

    def link(self, a: int, b: int) -> Link:
        return self._links.get((min(a, b), max(a, b)), Link())

    def set_link(self, a: int, b: int, link: Link) -> None:
        """Between two hosts, in both directions."""
        self._set_links({(a, b): link})

    def set_all_links(self, link: Link) -> None:
        """Between any two hosts."""
        self._set_links(dict.fromkeys(itertools.combinations(range(self._num_hosts), 2), link))

    def counters(self) -> Counters:
        """Of the switch."""
        return self._tell(Command())

    def kill_host(self, index: int) -> None:
        """At once and in silence, as when its power goes: nobody is told that its connections end."""
        self._check(index)
        self._tell(Command(unplug=[index]))
        self.hosts[index].kill()

    def close(self) -> None:
        """End all processes of all hosts, and the switch."""
        for host in self._everyone:
            if host.is_alive:
                host.kill()
        self._control.close()
        if self._switch is not None:
            self._switch.wait(10)

    def _set_links(self, links: dict[tuple[int, int], Link]) -> None:
        for (a, b), link in links.items():
            self._check(a)
            self._check(b)
            if a == b:
                raise ValueError(f"from host {a} to itself there is no link")
            self._links[min(a, b), max(a, b)] = link
        self._tell(Command([(a, b, link) for (a, b), link in links.items()]))

    def _check(self, index: int) -> None:
        if not 0 <= index < self._num_hosts:
            raise ValueError(f"host {index}: must be between 0 and {self._num_hosts - 1}")

    def _tell(self, command: Command) -> Counters:
        try:
            self._control.send(command.encode())
            answer = self._control.recv(1 << 16)
        except OSError as error:
            raise RuntimeError(f"the switch is gone: {error}") from error
        if not answer:
            raise RuntimeError("the switch is gone")
        return Counters.decode(answer)
