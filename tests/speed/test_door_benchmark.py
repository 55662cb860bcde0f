"""The benchmark of unfair clients, against a small server that is no better than it is told to be."""

import asyncio
import contextlib
import itertools
import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import typer
from typer.testing import CliRunner

from benchmarks.door import Measured, Target, main, measure


@contextlib.contextmanager
def serving(answers: Sequence[int | None]) -> Iterator[int]:
    """A server's port. It answers requests with these statuses, over and over; None cuts the connection instead."""
    statuses = itertools.cycle(answers)
    loop = asyncio.new_event_loop()
    is_up, is_over = threading.Event(), asyncio.Event()
    port = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
                status = 200 if head.startswith(b"get") else next(statuses)
                if status is None:
                    break
                writer.write(f"HTTP/1.1 {status} Told\r\nContent-Length: 2\r\n\r\n{{}}".encode())
                await asyncio.sleep(0.002)
        writer.close()

    async def serve() -> None:
        nonlocal port
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        is_up.set()
        await is_over.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    is_up.wait()
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(is_over.set)
        thread.join()
        loop.close()


async def test_who_is_cut_off_comes_again():
    with serving([200, 200, 503, None]) as port:
        measured = await measure(Target("127.0.0.1", port, None), num_workers=2, duration_s=1.0)
    assert measured.outcomes.keys() == {"200", "503", "lost"}
    assert len(measured.latencies_s) == measured.outcomes["200"] > measured.outcomes["503"] > 1
    assert measured.outcomes["lost"] > 2, "nobody came back"
    assert measured.figures(1.0)[2] == measured.outcomes["200"]


async def test_a_service_that_is_gone():
    with serving([200]) as port:
        pass
    measured = await measure(Target("127.0.0.1", port, None), num_workers=1, duration_s=0.3)
    assert measured.outcomes.keys() == {"lost"}
    assert measured.figures(0.3)[2] == 0


def test_figures_of_few_answers():
    assert Measured([0.25], Counter({"200": 1})).figures(2.0) == (250.0, 250.0, 0.5)
    p50, p99, rate = Measured([], Counter()).figures(2.0)
    assert math.isnan(p50)
    assert math.isnan(p99)
    assert rate == 0.0


def test_every_attack_has_its_line():
    """Honest clients get nothing but cut connections."""
    app = typer.Typer()
    app.command()(main)
    with serving([None]) as port:
        arguments = (f"http://127.0.0.1:{port}", "--seconds", "1", "--only", "idle connections")
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert last.split("  ")[0] == "idle connections"
    assert "0.0 → 0.0 (nan)" in last
    assert "x lost" in last
    assert "500 x still open" in last


def test_no_service_is_told():
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ("http://127.0.0.1:1",), env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "http://127.0.0.1:1: no service answers there" in result.stderr
