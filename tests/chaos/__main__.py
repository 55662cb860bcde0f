"""The long form: as many faults as asked for, against a service of two pipelines and two ingresses.

python -m tests.chaos --num-faults 500
python -m tests.chaos --num-faults 60 --num-pipelines 1 --one-at-a-time --kinds "kill stage" --output stages.json
"""

import asyncio
import json
import os
import platform
import random
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import httpx
import ray
import typer

from tests.chaos import harness
from tests.chaos.deployment import chaos_config
from tests.chaos.faults import FaultKind, Processes
from tests.chaos.repair import settle
from tests.chaos.report import Report, leaks, resource_lines
from tests.chaos.traffic import calls, undisturbed_answers
from tests.serving.service import URL, ServeRun


def main(
    num_faults: int = 500,
    interval_s: Annotated[float, typer.Option(help="Mean time between faults.")] = 4.0,
    concurrency: int = 12,
    num_calls: Annotated[int, typer.Option(help="Different requests; each is asked for many times.")] = 60,
    seed: int = 0,
    kinds: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = ",".join(FaultKind),
    num_pipelines: int = 2,
    one_at_a_time: Annotated[bool, typer.Option("--one-at-a-time", help="A fault waits for a whole service.")] = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file for every figure.")] = None,
) -> None:
    chosen = [FaultKind(kind.strip()) for kind in kinds.split(",")]
    plan = harness.Plan(chosen, num_faults, interval_s, concurrency, seed, is_one_at_a_time=one_at_a_time)
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    service = ServeRun(chaos_config(directory, num_pipelines=num_pipelines), directory / "output.log")
    try:
        service.wait_until_ready()
        has_failed = asyncio.run(_run(service, plan, num_calls, num_pipelines, output))
    finally:
        typer.echo(f"the service's output: {directory / 'output.log'}")
        service.interrupt()
    sys.exit(has_failed)


async def _run(service: ServeRun, plan: harness.Plan, num_calls: int, num_pipelines: int, output: Path | None) -> bool:
    processes = Processes(service.process.pid)
    wanted = calls(random.Random(plan.seed), num_calls)
    async with httpx.AsyncClient(base_url=URL, timeout=120) as client:
        expected = await undisturbed_answers(client, wanted)
    # Traffic without faults first: what a process keeps once it has served is no leak.
    calm = replace(plan, num_faults=0)
    await harness.run(URL, processes, wanted, expected, calm)
    census = processes.census()
    await settle(URL, processes, census)
    before = processes.resources()
    report = await harness.run(URL, processes, wanted, expected, plan)
    _show(report)
    await settle(URL, processes, census)
    after = processes.resources()
    found = leaks(before, after)
    for line in [*resource_lines(before, after), *(f"leak: {leak}" for leak in found)]:
        typer.echo(line)
    if output is not None:
        result = {
            "machine": {"num_cpus": os.cpu_count(), "python": platform.python_version(), "ray": ray.__version__},
            "plan": asdict(plan) | {"num_pipelines": num_pipelines, "num_different_calls": num_calls},
            **report.as_dict(),
            "resources": {role: {"before": asdict(before[role]), "after": asdict(after[role])} for role in before},
            "leaks": found,
        }
        output.write_text(json.dumps(result, indent=1) + "\n")
    return bool(report.unexcused() or found)


def _show(report: Report) -> None:
    for line in report.lines():
        typer.echo(line)
    for record in report.unexcused()[:20]:
        took = record.ended_at - record.started_at
        typer.echo(f"{record.outcome} after {took:.1f} s: {record.call.path} {record.call.body}: {record.detail[:500]}")


if __name__ == "__main__":
    typer.run(main)
