"""What a running service's clients notice of those who don't play fair: `python -m benchmarks.door URL [--key KEY]`.

The latency of small /generate requests beside each kind of attack, undisturbed just before it, and what the attackers
got. They run in a process of their own, but on the same machine as this: the ratios hold what they cost the service
and what they take from its cores.
"""

import asyncio
import ipaddress
import json
import math
import multiprocessing
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

import psutil
import typer
from rich.console import Console
from rich.table import Table

from gptj_serve.profiling.percentile import percentile

SMALL = json.dumps({"inputs": "The President said", "parameters": {"max_new_tokens": 1}}).encode()
LONGEST = json.dumps(
    {"inputs": "The", "parameters": {"max_new_tokens": 1000, "top_n_tokens": 20, "min_new_tokens": 1000}}
).encode()
OVERSIZED_BYTES = 64 << 20
PIECE = b" " * 65536
NUM_RUSHING = 8  # connections that ask as fast as they are answered
NUM_DRIBBLING = 200
NUM_IDLE = 500
NUM_STREAMS = 100
DRIBBLE_PERIOD_S = 0.5
SETTLE_S = 1.0  # for the attackers to be there
ANSWER_TIMEOUT_S = 60.0  # after which an honest client gives up
RECONNECT_S = 0.1  # after a connection was lost
WRONG_KEY = "surely-not-a-key-0000"
COLUMNS = {
    "beside": 19,
    "p50 ms": 22,
    "p99 ms": 22,
    "answers/s": 22,
    "honest got": 20,
    "attackers got": 24,
    "listener MiB": 13,
}
"""Titles and widths."""

console = Console(width=160)
LOST = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)


@dataclass(frozen=True)
class Target:
    host: str
    port: int
    key: str | None

    def head(self, method: str, path: str, key: str | None, *lines: str) -> bytes:
        """A request's head, without the empty line that ends it."""
        keys = [] if key is None else [f"Authorization: Bearer {key}"]
        content = ["Content-Type: application/json"] if method == "POST" else []
        return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {self.host}", *keys, *content, *lines]).encode()


class Connection:
    """One HTTP/1.1 connection, as little of it as can be."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, target: Target) -> "Connection":
        return cls(*await asyncio.open_connection(target.host, target.port))

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def ask(self, head: bytes, body: bytes = b"") -> int:
        await self.send(head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        return await self.status()

    async def status(self) -> int:
        """That of the next response, all of which is read."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        if "transfer-encoding: chunked" in head:
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                await self._reader.readexactly(size + 2)
            await self._reader.readexactly(2)
        else:
            await self._reader.readexactly(int(head.partition("content-length:")[2].split("\r\n", 1)[0]))
        return int(head.split(" ", 2)[1])

    def close(self) -> None:
        self._writer.close()


# ── the attackers ────────────────────────────────────────────────────────────────────────────────────────

Attack = Callable[[Target, float], Awaitable[str]]
"""Goes on until a time of the loop; returns or raises how a connection ended."""


async def ask_with_wrong_key(target: Target, until: float) -> str:
    connection = await Connection.open(target)
    try:
        return str(await connection.ask(target.head("POST", "/generate", WRONG_KEY), SMALL))
    finally:
        connection.close()


async def send_oversized(target: Target, until: float) -> str:
    """A body of declared size, sent until there is an answer or the connection is closed."""
    return await _flood(target, until, f"Content-Length: {OVERSIZED_BYTES}", PIECE)


async def send_endless(target: Target, until: float) -> str:
    """The same in chunks: nobody knows where it ends."""
    chunk = b"%x\r\n%s\r\n" % (len(PIECE), PIECE)
    return await _flood(target, until, "Transfer-Encoding: chunked", chunk)


async def _flood(target: Target, until: float, length: str, piece: bytes) -> str:
    connection = await Connection.open(target)
    answer = asyncio.ensure_future(connection.status())
    try:
        with suppress(*LOST):
            await connection.send(target.head("POST", "/generate", target.key, length) + b"\r\n\r\n")
            while not answer.done() and asyncio.get_running_loop().time() < until:
                await connection.send(piece)
        return str(await asyncio.wait_for(answer, 1.0))
    finally:
        answer.cancel()
        connection.close()


async def dribble_headers(target: Target, until: float) -> str:
    return await _dribble(target, until, target.head("POST", "/generate", target.key, "X-Slow: "))


async def dribble_body(target: Target, until: float) -> str:
    return await _dribble(target, until, target.head("POST", "/generate", target.key, "Content-Length: 1000\r\n\r\n"))


async def read_stream(target: Target, until: float) -> str:
    """The longest streamed answer, taken as it comes: what `leave_unread` would cost if it were read."""
    connection = await Connection.open(target)
    try:
        async with asyncio.timeout_at(until):
            return str(await connection.ask(target.head("POST", "/generate_stream", target.key), LONGEST))
    except TimeoutError:
        return "still open"
    finally:
        connection.close()


async def leave_unread(target: Target, until: float) -> str:
    """The same, of which nothing is ever read."""
    loop = asyncio.get_running_loop()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what the system would take for us
        connection.setblocking(False)
        await loop.sock_connect(connection, (target.host, target.port))
        head = target.head("POST", "/generate_stream", target.key, f"Content-Length: {len(LONGEST)}")
        await loop.sock_sendall(connection, head + b"\r\n\r\n" + LONGEST)
        await asyncio.sleep(until - loop.time())
        with suppress(*LOST):
            await loop.sock_sendall(connection, b"\r\n")  # who is no longer there says so only when asked
        await asyncio.sleep(SETTLE_S)
        return "closed" if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) else "still open"


async def idle(target: Target, until: float) -> str:
    connection = await Connection.open(target)
    await asyncio.sleep(until - asyncio.get_running_loop().time())
    connection.close()
    return "still open"


async def _dribble(target: Target, until: float, start: bytes) -> str:
    connection = await Connection.open(target)
    answer = asyncio.ensure_future(connection.status())
    try:
        await connection.send(start)
        while (rest_s := until - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait([answer], timeout=min(DRIBBLE_PERIOD_S, rest_s))
            if answer.done():
                return str(answer.result())
            await connection.send(b"a")
        return "still open"
    finally:
        answer.cancel()
        connection.close()


ATTACKS: dict[str, tuple[Attack, int, bool]] = {  # how, on how many connections, whether again and again
    "wrong keys": (ask_with_wrong_key, NUM_RUSHING, True),
    "oversized bodies": (send_oversized, NUM_RUSHING, True),
    "endless bodies": (send_endless, NUM_RUSHING, True),
    "headers dribbled": (dribble_headers, NUM_DRIBBLING, True),
    "bodies dribbled": (dribble_body, NUM_DRIBBLING, True),
    "idle connections": (idle, NUM_IDLE, False),
    "streams read": (read_stream, NUM_STREAMS, False),
    "streams left unread": (leave_unread, NUM_STREAMS, False),
}


def attack(name: str, target: Target, duration_s: float) -> Counter[str]:
    """What became of all connections."""
    how, num_connections, is_repeated = ATTACKS[name]
    outcomes: Counter[str] = Counter()

    async def one_after_another(until: float) -> None:
        while asyncio.get_running_loop().time() < until:
            try:
                outcomes[await how(target, until)] += 1
            except (*LOST, TimeoutError):
                outcomes["closed"] += 1
            if not is_repeated:
                return

    async def all_at_once() -> None:
        until = asyncio.get_running_loop().time() + duration_s
        await asyncio.gather(*[one_after_another(until) for _ in range(num_connections)])

    asyncio.run(all_at_once())
    return outcomes


# ── the honest ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Measured:
    latencies_s: list[float]  # of answers with status 200, connecting included
    outcomes: Counter[str]  # of all requests: statuses, or that they were lost

    def figures(self, duration_s: float) -> tuple[float, float, float]:
        """p50 and p99 in milliseconds, answers per second."""
        p50_s, p99_s = (percentile(self.latencies_s, share) for share in (0.5, 0.99))
        return p50_s * 1000, p99_s * 1000, len(self.latencies_s) / duration_s


async def measure(target: Target, num_workers: int, duration_s: float) -> Measured:
    """Whoever is cut off comes again: that is what an attack does to the honest."""
    measured = Measured([], Counter())
    until = time.perf_counter() + duration_s

    async def worker() -> None:
        connection = None
        while (began_at := time.perf_counter()) < until:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    connection = connection or await Connection.open(target)
                    status = await connection.ask(target.head("POST", "/generate", target.key), SMALL)
            except LOST:
                measured.outcomes["lost"] += 1
                if connection is not None:
                    connection.close()
                    connection = None
                await asyncio.sleep(RECONNECT_S)
                continue
            measured.outcomes[str(status)] += 1
            if status == 200:
                measured.latencies_s.append(time.perf_counter() - began_at)
        if connection is not None:
            connection.close()

    await asyncio.gather(*[worker() for _ in range(num_workers)])
    return measured


def listener_mib(port: int) -> float | None:
    """Resident memory of the process of this user that listens on a port of this machine, if there is one."""
    for process in psutil.process_iter():
        try:
            if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in process.net_connections("tcp")):
                return process.memory_info().rss / 2**20
        except psutil.Error:
            continue
    return None


async def needs_key(target: Target) -> bool:
    connection = await Connection.open(target)
    status = await connection.ask(target.head("GET", "/status", None))
    connection.close()
    return status == 401


def main(
    url: Annotated[str, typer.Argument(help="Of the service, as http://127.0.0.1:8000")],
    key: Annotated[str | None, typer.Option(help="An API key, if the service needs one.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Honest clients.")] = 4,
    seconds: Annotated[float, typer.Option(min=1, help="Of each measurement.")] = 10.0,
    only: Annotated[list[str] | None, typer.Option(help="One of the attacks; may be repeated. Default: all.")] = None,
    any_host: Annotated[bool, typer.Option("--any-host", help="Also another machine: ask its owner first.")] = False,
) -> None:
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise typer.BadParameter(f"{url}: must be http://host:port")
    if not any_host and not _is_loopback(parts.hostname):
        raise typer.BadParameter(f"{url}: is not on loopback; --any-host attacks it nevertheless")
    if unknown := set(only or ()) - set(ATTACKS):
        raise typer.BadParameter(f"--only {sorted(unknown)}: must be of {list(ATTACKS)}")
    target = Target(parts.hostname, parts.port or 80, key)
    try:
        is_closed = asyncio.run(needs_key(target))
    except LOST as error:
        raise typer.BadParameter(f"{url}: no service answers there: {error}") from None
    if is_closed != (key is not None):
        needs = (
            "needs a key: give one with --key" if is_closed else "takes no key: is it the service you mean to attack?"
        )
        raise typer.BadParameter(f"{url}: the service {needs}")
    console.print(f"{workers} clients; without → beside the attack (ratio)")
    console.print(_line())
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        for name in only or ATTACKS:
            if name == "wrong keys" and not is_closed:
                continue  # an open service takes any key
            before_mib = listener_mib(target.port)
            alone = asyncio.run(measure(target, workers, seconds))
            ongoing = process.submit(attack, name, target, seconds + 2 * SETTLE_S)
            time.sleep(SETTLE_S)
            beside = asyncio.run(measure(target, workers, seconds))
            after_mib = listener_mib(target.port)
            outcomes = ongoing.result()
            cells = map(_changed, alone.figures(seconds), beside.figures(seconds))
            row = (name, *cells, _listed(beside.outcomes), _listed(outcomes), _change(before_mib, after_mib))
            console.print(_line(row))


def _line(cells: Sequence[str] | None = None) -> Table:
    """A row of what is a table together, or its titles: each is printed when it is there."""
    table = Table(box=None, show_header=cells is None, padding=(0, 1), pad_edge=False)
    for title, width in COLUMNS.items():
        table.add_column(title, width=width)
    if cells is not None:
        table.add_row(*cells)
    return table


def _changed(was: float, now: float) -> str:
    return f"{was:.1f} → {now:.1f} ({now / was if was else math.nan:.2f})"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in counts.most_common())


def _change(before_mib: float | None, after_mib: float | None) -> str:
    return "?" if before_mib is None or after_mib is None else f"{before_mib:.0f} → {after_mib:.0f}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    typer.run(main)
