"""The long form: as many faults as asked for, against a service of two pipelines and two ingresses.

python -m tests.chaos --num-faults 500
"""

import asyncio
import random
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import httpx
import typer

from tests.chaos import harness
from tests.chaos.deployment import chaos_config
from tests.chaos.faults import FaultKind, Processes
from tests.chaos.traffic import calls, undisturbed_answers
from tests.serving.service import URL, ServeRun


def main(
    num_faults: int = 500,
    interval_s: Annotated[float, typer.Option(help="Mean time between faults.")] = 4.0,
    concurrency: int = 12,
    num_calls: Annotated[int, typer.Option(help="Different requests; each is asked for many times.")] = 60,
    seed: int = 0,
    kinds: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = ",".join(FaultKind),
) -> None:
    chosen = [FaultKind(kind.strip()) for kind in kinds.split(",")]
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    service = ServeRun(chaos_config(directory), directory / "output.log")
    try:
        service.wait_until_ready()
        asyncio.run(_run(service, chosen, num_faults, interval_s, concurrency, num_calls, seed))
    finally:
        typer.echo(f"the service's output: {directory / 'output.log'}")
        service.interrupt()


async def _run(
    service: ServeRun,
    kinds: list[FaultKind],
    num_faults: int,
    interval_s: float,
    concurrency: int,
    num_calls: int,
    seed: int,
) -> None:
    processes = Processes(service.process.pid)
    wanted = calls(random.Random(seed), num_calls)
    async with httpx.AsyncClient(base_url=URL, timeout=120) as client:
        expected = await undisturbed_answers(client, wanted)
    census, before = processes.census(), processes.resources()
    report = await harness.run(
        URL,
        processes,
        wanted,
        expected,
        kinds=kinds,
        num_faults=num_faults,
        interval_s=interval_s,
        concurrency=concurrency,
        seed=seed,
    )
    for line in report.lines():
        typer.echo(line)
    unexcused = report.unexcused()
    for record in unexcused[:20]:
        took = record.ended_at - record.started_at
        typer.echo(f"{record.outcome} after {took:.1f} s: {record.call.path} {record.call.body}: {record.detail[:500]}")
    await harness.settle(URL, processes, census)
    for role, (files, memory) in processes.resources().items():
        typer.echo(f"{role}: files {before[role][0]} → {files}, memory {before[role][1] >> 20} → {memory >> 20} MiB")
    if unexcused:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
