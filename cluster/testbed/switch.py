"""The switch between the hosts: a process that moves Ethernet frames from one TAP device to another.

Linux has netem for latency and loss, but many kernels are built without it; and two mechanisms would be one too many.
So the switch does everything: a frame waits in a queue for its link's latency, is lost by its link's chance, or always
on a link that is cut. Frames of one link keep their order.

A host's MAC address holds its port (`mac_address`), so there is nothing to learn: what is for all goes to all.
"""

import errno
import heapq
import os
import random
import select
import socket
import sys
import time
from collections.abc import Mapping

from cluster.testbed.links import Command, Counters, Link

MAX_FRAME_BYTES = 1 << 16
MAX_FRAMES_AT_ONCE = 64
"""From one port, before the others and what is due have their turn."""

_PLAIN = Link()


def mac_address(port: int) -> bytes:
    """Locally administered, as its first byte says."""
    return b"\x02\x00\x00\x00" + port.to_bytes(2, "big")


class Switch:
    """`ports` are the file descriptors of the TAP devices, not blocking, by their numbers; `control` takes commands."""

    def __init__(self, ports: Mapping[int, int], control: socket.socket, seed: int = 0) -> None:
        self._ports = dict(ports)
        self._control = control
        self._links: dict[tuple[int, int], Link] = {}
        self._waiting: list[tuple[float, int, int, bytes]] = []  # due at, sequence number, port, frame
        self._num_queued = 0
        self._random = random.Random(seed)
        self._counters = Counters()

    def run(self) -> None:
        """Until the other end of `control` is closed."""
        while True:
            timeout_s = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None
            numbers = {descriptor: port for port, descriptor in self._ports.items()}
            readable, _, _ = select.select([self._control.fileno(), *numbers], [], [], timeout_s)
            self._deliver_due()
            for ready in readable:
                if ready == self._control.fileno():
                    message = self._control.recv(MAX_FRAME_BYTES)
                    if not message:
                        return
                    self._obey(Command.decode(message))
                    self._control.send(self._counters.encode())
                elif (port := numbers[ready]) in self._ports:
                    self._take_from(port)

    def _obey(self, command: Command) -> None:
        for a, b, link in command.links:
            self._links[a, b] = self._links[b, a] = link
        for port in command.unplug:
            self._unplug(port)

    def _unplug(self, port: int) -> None:
        descriptor = self._ports.pop(port, None)
        if descriptor is not None:
            os.close(descriptor)  # with this its network namespace can go

    def _take_from(self, port: int) -> None:
        for _ in range(MAX_FRAMES_AT_ONCE):
            try:
                frame = os.read(self._ports[port], MAX_FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError:  # the device is gone
                self._unplug(port)
                return
            destination = frame[:6]
            if destination[:4] == mac_address(0)[:4]:
                self._send(port, int.from_bytes(destination[4:], "big"), frame)
            else:
                for other in list(self._ports):
                    if other != port:
                        self._send(port, other, frame)

    def _send(self, source: int, destination: int, frame: bytes) -> None:
        link = self._links.get((source, destination), _PLAIN)
        if link.is_cut or (link.loss and self._random.random() < link.loss):
            self._counters.num_lost += 1
        elif link.latency_s:
            self._num_queued += 1
            heapq.heappush(self._waiting, (time.monotonic() + link.latency_s, self._num_queued, destination, frame))
        else:
            self._deliver(destination, frame)

    def _deliver_due(self) -> None:
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            _, _, destination, frame = heapq.heappop(self._waiting)
            self._deliver(destination, frame)

    def _deliver(self, destination: int, frame: bytes) -> None:
        try:
            os.write(self._ports[destination], frame)
        except KeyError:
            self._counters.num_lost += 1
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOBUFS, errno.EIO, errno.EBADFD):
                raise
            self._counters.num_lost += 1
        else:
            self._counters.num_forwarded += 1
            self._counters.num_bytes += len(frame)


def main(control: int, *descriptors: int) -> None:
    """In a process of its own: file descriptors that it inherits, the ports' in their order."""
    for descriptor in descriptors:
        os.set_blocking(descriptor, False)
    with socket.socket(fileno=control) as commands:
        Switch(dict(enumerate(descriptors)), commands).run()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
