"""What the testbed itself adds and bears: round trips and throughput between two hosts, beside a loopback device's."""

import socket
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from cluster.testbed.host import Host
from cluster.testbed.links import Link
from cluster.testbed.testbed import Testbed

SIZES = (64, 8_192, 131_072)
NUM_ROUND_TRIPS = 2000
NUM_BYTES = 200_000_000
LATENCY_S = 0.03


def measure(mtu: int, show: Callable[[str], None]) -> None:
    with Testbed(2, mtu) as testbed:
        a, b = testbed.hosts
        for size in SIZES:
            own, between = (_round_trips_s(a, other, size, NUM_ROUND_TRIPS) for other in (a, b))
            show(f"round trip of {size:,} bytes, median and p99: on one host {_us(own)}, between hosts {_us(between)}")
        before, began_at = testbed.counters(), time.monotonic()
        _stream(a, b)
        took_s, after = time.monotonic() - began_at, testbed.counters()
        num_frames = after.num_forwarded - before.num_forwarded
        num_bytes = after.num_bytes - before.num_bytes
        rates = f"{num_bytes / took_s / 1e6:,.0f} MB/s, {num_frames / took_s:,.0f} frames/s"
        show(f"one stream at an MTU of {mtu:,}: {rates}, {after.num_lost - before.num_lost} lost")
        testbed.set_all_links(Link(latency_s=LATENCY_S))
        slow = _round_trips_s(a, b, SIZES[0], 50)
        show(f"with {LATENCY_S * 1e3:.0f} ms each way, a round trip of {SIZES[0]} bytes: {_us(slow)}")


def _us(times_s: list[float]) -> str:
    return f"{statistics.median(times_s) * 1e6:,.0f} and {sorted(times_s)[len(times_s) * 99 // 100] * 1e6:,.0f} µs"


def _round_trips_s(a: Host, b: Host, size: int, count: int) -> list[float]:
    client, server = _connected(a, b)
    message = bytes(size)

    def echo() -> None:
        with server:
            while message := server.recv(size, socket.MSG_WAITALL):
                server.sendall(message)

    thread = threading.Thread(target=echo)
    thread.start()
    times = []
    with client:
        for _ in range(count):
            began_at = time.perf_counter()
            client.sendall(message)
            client.recv(size, socket.MSG_WAITALL)
            times.append(time.perf_counter() - began_at)
    thread.join()
    return times


def _stream(a: Host, b: Host) -> None:
    sender, receiver = _connected(a, b)

    def send() -> None:
        with sender:
            block = bytes(1 << 20)
            for _ in range(NUM_BYTES // len(block)):
                sender.sendall(block)

    thread = threading.Thread(target=send)
    thread.start()
    with receiver:
        while receiver.recv(1 << 20):
            pass
    thread.join()


def _connected(a: Host, b: Host) -> tuple[socket.socket, socket.socket]:
    with b.network(), socket.create_server((b.address, 0)) as listener:
        inside: AbstractContextManager[None] = nullcontext() if a is b else a.network()
        with inside:
            client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    for end in (client, server):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, server
