"""Offered load from half to ten times what the service can do: `python -m benchmarks.overload --trace CSV`.

Requests have the lengths of the trace (arrival, prompt tokens, output tokens per line; those that fit the model) and
its arrivals, compressed to the offered load. The sustainable load is measured first: as many requests at a time as the
service takes, without a pause. Then each load is offered for a while by clients that neither wait for each other nor
try again. Goodput counts the tokens that arrive, in the time after the first third, of answers that began within
`max_queue_wait_s` plus five seconds and came to their end. One request in twenty has priority -10.

`--unbounded LOAD` offers that load once more to a service with `max_queue_wait_s: null`. `--tokenizer DIRECTORY` makes
a random model of 405 M parameters with that directory's tokenizer.json and uses it instead of the demo. Starts
`serve run` on port 8000 and stops it at the end; this client shares the machine's cores with it.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.number_lists import positive_numbers
from benchmarks.serve_run import HOST, MODEL_NAME, PORT, make_model, running_service
from benchmarks.speed.load import Shape, check_offer, compressed, read_trace
from gptj_serve.config import ServiceConfig
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.profiling.percentile import percentile

CLOSED_LOOP_REQUESTS = 32
SLACK_S = 5.0
PRIORITY, PRIORITY_SHARE = -10, 0.05
DRAIN_TIMEOUT_S = 120.0
END_MARKER = b"data: [DONE]"
console = Console(width=150)


@dataclass
class Call:
    began_at: float
    has_priority: bool
    status: int = 0
    answered_at: float = 0.0  # when the headers came
    first_at: float | None = None
    ended_at: float | None = None  # with its end marker
    retry_after_s: int | None = None
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # when, events

    @property
    def ttft_s(self) -> float:
        return (self.first_at or float("inf")) - self.began_at


@dataclass
class Result:
    """Of one offered load. Rates are per second, times in seconds."""

    load: float
    is_bounded: bool
    offered_requests: float
    goodput_tokens: float
    num_calls: int
    num_good: int
    num_refused: int
    num_refused_late: int  # after more than a second
    num_broken: int
    ttft_p50: float
    ttft_p99: float
    priority_ttft_p99: float
    num_priority_refused: int
    median_retry_after: float
    max_num_waiting: int
    memory_before_bytes: int
    max_memory_bytes: int
    cores: dict[str, float]  # that were busy, by what they worked for


def main(
    trace: Annotated[Path, typer.Option(help="CSV of arrival, prompt tokens, output tokens.")],
    loads: str = "0.5,1,2,5,10",
    seconds: Annotated[float, typer.Option(min=1, help="For which each load is offered.")] = 60.0,
    max_queue_wait_s: float = 10.0,
    unbounded: Annotated[float | None, typer.Option(min=0.01, help="A load to offer without a limit too.")] = None,
    num_stages: int = 2,
    kernels: Annotated[str, typer.Option(help="As pipeline.kernels.")] = "auto",
    tokenizer: Annotated[Path | None, typer.Option(help="Directory of a tokenizer.json: 405 M model.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG to draw; needs matplotlib.")] = None,
) -> None:
    offered = positive_numbers("--loads", loads, float)
    results: list[Result] = []

    def keep(result: Result) -> None:
        results.append(result)
        show(results)
        if output is not None:
            output.write_text(json.dumps([asdict(result) for result in results], indent=1))

    with tempfile.TemporaryDirectory(prefix="overload-") as work:
        directory = ServiceConfig().checkpoint_dir if tokenizer is None else make_model(tokenizer, Path(work))
        shapes = read_trace(trace, Checkpoint.open(directory).config.n_positions)
        _, num_prompt, num_new = (statistics.mean(column) for column in zip(*shapes, strict=True))
        console.print(f"{len(shapes)} requests fit; on average {num_prompt:.0f} prompt and {num_new:.0f} new tokens")
        scheduler = {"max_queue_wait_s": max_queue_wait_s}
        with running_service(directory, num_stages, Path(work), scheduler=scheduler, kernels=kernels) as service:
            sustainable = asyncio.run(closed_loop(shapes, seconds))
            console.print(f"sustainable: {sustainable:.2f} requests/s")
            check_loads(shapes, [*offered, *([] if unbounded is None else [unbounded])], sustainable, seconds)
            for load in offered:
                run = offer(shapes, load, sustainable, seconds, max_queue_wait_s, psutil.Process(service.pid))
                keep(asyncio.run(run))
        if unbounded is not None:
            scheduler = {"max_queue_wait_s": None}
            with running_service(directory, num_stages, Path(work), scheduler=scheduler, kernels=kernels) as service:
                process = psutil.Process(service.pid)
                run = offer(shapes, unbounded, sustainable, seconds, max_queue_wait_s, process, is_bounded=False)
                keep(asyncio.run(run))
    if plot is not None:
        draw(plot, results, max_queue_wait_s)


def check_loads(shapes: Sequence[Shape], loads: Sequence[float], sustainable: float, seconds: float) -> None:
    """Before the first is offered: ends the program if one can't be."""
    if sustainable == 0:
        raise SystemExit(f"the service finished no request in {seconds / 2:g} s: --seconds={seconds:g} is too short")
    for load in loads:
        try:
            check_offer(shapes, load * sustainable, seconds)
        except ValueError as error:
            raise SystemExit(f"a load of {load:g}x can't be offered: {error}") from None


# ------------------------------------------------------------------------------------------------ clients


async def closed_loop(shapes: Sequence[Shape], seconds: float) -> float:
    """Requests/s that the service finishes when it always has enough of them."""
    source = iter(itertools.cycle(shapes))
    deadline = time.monotonic() + seconds
    num_finished = 0

    async def worker() -> None:
        nonlocal num_finished
        while time.monotonic() < deadline:
            call = await request(next(source), has_priority=False)
            if call.ended_at is not None and deadline - seconds / 2 < call.ended_at <= deadline:
                num_finished += 1

    await asyncio.gather(*[worker() for _ in range(CLOSED_LOOP_REQUESTS)])
    return num_finished / (seconds / 2)


async def offer(
    shapes: Sequence[Shape],
    load: float,
    sustainable: float,
    seconds: float,
    max_queue_wait_s: float,
    service: psutil.Process,
    *,
    is_bounded: bool = True,
) -> Result:
    rng = random.Random(1)
    chosen = compressed(shapes, load * sustainable, seconds, rng)
    calls: list[asyncio.Task[Call]] = []
    watch = asyncio.create_task(watch_service(service))
    cpu_before = cpu_seconds(service)
    began_at = time.monotonic()
    for shape in chosen:
        await asyncio.sleep(max(0.0, began_at + shape[0] - time.monotonic()))
        calls.append(asyncio.create_task(request(shape, has_priority=rng.random() < PRIORITY_SHARE)))
    ended_at = began_at + seconds
    await asyncio.sleep(max(0.0, ended_at - time.monotonic()))
    cores = {part: (spent - cpu_before.get(part, 0.0)) / seconds for part, spent in cpu_seconds(service).items()}
    _, unfinished = await asyncio.wait(calls, timeout=DRAIN_TIMEOUT_S)
    for task in unfinished:
        task.cancel()
    watch.cancel()
    memory_before, max_memory, max_num_waiting = (await asyncio.gather(watch, return_exceptions=False))[0]
    done = [task.result() for task in calls if task not in unfinished]
    good = [c for c in done if c.ended_at is not None and c.ttft_s <= max_queue_wait_s + SLACK_S]
    taken = [call.ttft_s for call in done if call.first_at is not None]
    urgent = [call.ttft_s for call in done if call.first_at is not None and call.has_priority]
    window = (began_at + seconds / 3, ended_at)
    num_tokens = sum(n for call in good for at, n in call.arrivals if window[0] < at <= window[1])
    retries = [call.retry_after_s for call in done if call.retry_after_s is not None]
    return Result(
        load=load,
        is_bounded=is_bounded,
        offered_requests=len(chosen) / seconds,
        goodput_tokens=num_tokens / (window[1] - window[0]),
        num_calls=len(calls),
        num_good=len(good),
        num_refused=sum(call.status == 503 for call in done),
        num_refused_late=sum(call.status == 503 and call.answered_at - call.began_at > 1 for call in done),
        num_broken=len(unfinished) + sum(call.status != 503 and call.ended_at is None for call in done),
        ttft_p50=percentile(taken, 0.5),
        ttft_p99=percentile(taken, 0.99),
        priority_ttft_p99=percentile(urgent, 0.99),
        num_priority_refused=sum(call.status == 503 and call.has_priority for call in done),
        median_retry_after=statistics.median(retries) if retries else 0.0,
        max_num_waiting=max_num_waiting,
        memory_before_bytes=memory_before,
        max_memory_bytes=max_memory,
        cores=cores,
    )


async def request(shape: Shape, *, has_priority: bool) -> Call:
    """One streamed completion over a connection of its own; nothing but its events is counted."""
    _, num_prompt_tokens, num_new_tokens = shape
    call = Call(time.monotonic(), has_priority)
    seed = random.getrandbits(30)
    body = {
        "model": MODEL_NAME,
        "prompt": [1 + (seed + 31 * position * (1 + seed % 97)) % 4000 for position in range(num_prompt_tokens)],
        "max_tokens": num_new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    head += f"X-Priority: {PRIORITY}\r\n" * has_priority
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection(HOST, PORT)
        try:
            writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            status, *headers = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
            call.status, call.answered_at = int(status.split()[1]), time.monotonic()
            for header in headers:
                name, _, value = header.partition(b":")
                if name.lower() == b"retry-after":
                    call.retry_after_s = int(value)
            end = b""
            while chunk := await reader.read(65536):
                now = time.monotonic()
                num_events = chunk.count(b"data: {")
                if call.status == 200 and num_events:
                    call.first_at = call.first_at or now
                    call.arrivals.append((now, num_events))
                if END_MARKER in end + chunk:
                    call.ended_at = now
                end = chunk[-len(END_MARKER) :]
        finally:
            writer.close()
    return call


async def watch_service(service: psutil.Process) -> tuple[int, int, int]:
    """Until cancelled: resident bytes of all its processes at first and at most, and the longest queue."""
    memory: list[int] = []
    waiting = [0]
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{PORT}", timeout=10) as client:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                memory.append(resident_bytes(service))
                with contextlib.suppress(httpx.HTTPError):
                    answer = await client.get("/status")
                    if answer.is_success:  # else its body is an error's, as while the pipeline starts again
                        pipelines: list[Any] = answer.json()["pipelines"]
                        waiting.append(sum(pipeline["engine"]["num_waiting"] for pipeline in pipelines))
                await asyncio.sleep(2)
    return memory[0], max(memory), max(waiting)


def resident_bytes(service: psutil.Process) -> int:
    total = 0
    for process in service.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total


PARTS = {
    "stages": "GPTJStage",
    "engines": "ServeReplica:gptj:Pipeline",
    "ingresses": "ServeReplica:gptj:Ingress",
    "proxies": "ProxyActor",
}
"""What the processes of the service are called."""


def cpu_seconds(service: psutil.Process) -> dict[str, float]:
    """Spent so far, by part of the service; `ray` is what is none of them, `client` this process."""
    spent = dict.fromkeys([*PARTS, "ray", "client"], 0.0)
    for process in [psutil.Process(), *service.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            part = next((part for part, word in PARTS.items() if word in title), "ray")
            times = process.cpu_times()
            spent["client" if process.pid == os.getpid() else part] += times.user + times.system
    return spent


# ------------------------------------------------------------------------------------------------ what came of it


def show(results: Sequence[Result]) -> None:
    columns = ("load", "requests/s", "good tokens/s", "of peak", "good", "refused (late)", "broken")
    more = ("first token p50, p99 s", "priority: refused, p99 s", "Retry-After", "longest queue", "memory MiB")
    table = Table(*columns, *more, "busy cores")
    peak = max(1e-9, *(result.goodput_tokens for result in results))
    for r in results:
        table.add_row(
            f"{r.load:g}x" + " unbounded" * (not r.is_bounded),
            f"{r.offered_requests:.1f}",
            f"{r.goodput_tokens:.0f}",
            f"{r.goodput_tokens / peak:.2f}",
            f"{r.num_good} of {r.num_calls}",
            f"{r.num_refused} ({r.num_refused_late})",
            str(r.num_broken),
            f"{r.ttft_p50:.2f}, {r.ttft_p99:.2f}",
            f"{r.num_priority_refused}, {r.priority_ttft_p99:.2f}",
            f"{r.median_retry_after:.0f}",
            str(r.max_num_waiting),
            f"{r.memory_before_bytes >> 20}, at most {r.max_memory_bytes >> 20}",
            ", ".join(f"{part} {cores:.2f}" for part, cores in r.cores.items()),
        )
    console.print(table)


def draw(file: Path, results: Sequence[Result], max_queue_wait_s: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    bounded = [result for result in results if result.is_bounded]
    unbounded = [result for result in results if not result.is_bounded]
    loads = [result.load for result in bounded]
    axes[0].plot(loads, [r.goodput_tokens for r in bounded], "o-", color="#12776b")
    axes[0].plot([r.load for r in unbounded], [r.goodput_tokens for r in unbounded], "x", color="#b3261e")
    axes[0].set_ylim(bottom=0)
    axes[0].set_title("good tokens/s", fontsize=10)
    axes[1].plot(loads, [r.ttft_p50 for r in bounded], "o-", color="#12776b", label="p50")
    axes[1].plot(loads, [r.ttft_p99 for r in bounded], "o--", color="#12776b", label="p99")
    axes[1].plot(
        [r.load for r in unbounded], [r.ttft_p99 for r in unbounded], "x", color="#b3261e", label="p99, no limit"
    )
    axes[1].axhline(max_queue_wait_s, color="#9aa5a0", linewidth=1, label="max_queue_wait_s")
    axes[1].set_title("time to first token, s", fontsize=10)
    axes[1].legend(frameon=False, fontsize=8)
    axes[2].plot(loads, [r.num_refused / r.num_calls for r in bounded], "o-", color="#12776b")
    axes[2].set_ylim(0, 1)
    axes[2].set_title("share refused", fontsize=10)
    for panel in axes:
        panel.set_xlabel("offered load / sustainable")
        panel.set_xscale("log")
        panel.set_xticks(loads, [f"{load:g}" for load in loads])
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    typer.run(main)
