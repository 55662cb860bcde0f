"""A long run of steady traffic without faults, from clients of whom some leave: nothing may grow, no answer change.

python -m tests.soak --minutes 60
"""

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from tests.chaos.deployment import chaos_config
from tests.chaos.faults import Processes
from tests.chaos.harness import call_once
from tests.chaos.repair import settle
from tests.chaos.traffic import Call, Outcome, calls, is_same, undisturbed_answers
from tests.serving.service import URL, ServeRun
from tests.soak.measure import ClusterState, Samples, by_process, cluster_differences, differences

SAMPLE_INTERVAL_S = 5.0

RESTING_S = 25.0
"""By then processes have closed what they close when idle, and handed their metrics over."""

LEAVING_PROBABILITY = 0.2
MAX_STAY_S = 3.0
"""Of a client that leaves before its answer is whole."""

MAX_PAUSE_S = 0.5

FULL_SOON = {"RAY_task_events_max_num_task_in_gcs": "1000"}
"""Of its 100,000 last tasks, Ray's GCS knows what became: hours of traffic until that no longer grows."""


def main(
    minutes: float = 60.0,
    warm_up_minutes: Annotated[float, typer.Option(help="Traffic that comes first and is not looked at.")] = 10.0,
    concurrency: int = 8,
    num_calls: Annotated[int, typer.Option(help="Different requests; each is asked for many times.")] = 60,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="A JSON file for every figure.")] = None,
) -> None:
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    service = ServeRun(chaos_config(directory), directory / "output.log", **FULL_SOON)
    try:
        service.wait_until_ready()
        result = asyncio.run(_soak(service, 60 * warm_up_minutes, 60 * minutes, concurrency, num_calls, seed))
    finally:
        typer.echo(f"the service's output: {directory / 'output.log'}")
        service.interrupt()
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["problems"]))


async def _soak(
    service: ServeRun, warm_up_s: float, duration_s: float, concurrency: int, num_calls: int, seed: int
) -> dict[str, Any]:
    processes = Processes(service.process.pid)
    wanted = calls(random.Random(seed), num_calls)
    async with httpx.AsyncClient(base_url=URL, timeout=120) as client:
        expected = await undisturbed_answers(client, wanted)
    await _traffic(wanted, expected, warm_up_s, concurrency, seed + 1)
    census = processes.census()
    await settle(URL, processes, census)
    await asyncio.sleep(RESTING_S)
    before, cluster_before = by_process(processes), await asyncio.to_thread(ClusterState.read)

    samples = Samples()
    sampler = asyncio.create_task(_sample(processes, samples))
    outcomes, problems = await _traffic(wanted, expected, duration_s, concurrency, seed + 2)
    sampler.cancel()
    async with httpx.AsyncClient(base_url=URL, timeout=120) as client:
        answers = await undisturbed_answers(client, wanted)
    num_changed = sum(not is_same(one, other) for one, other in zip(answers, expected, strict=True))
    if num_changed:
        problems.append(f"{num_changed} of {len(wanted)} answers are other ones in the end")
    await settle(URL, processes, census)  # no KV block is used, no sequence waits
    await asyncio.sleep(RESTING_S)
    after, cluster_after = by_process(processes), await asyncio.to_thread(ClusterState.read)
    fits = samples.fits()
    problems += differences(before, after) + cluster_differences(cluster_before, cluster_after)
    problems += [f"{name}: memory grows: {fit}" for name, fit in fits.items() if fit.is_leak]

    typer.echo(f"{duration_s / 60:.0f} minutes: " + ", ".join(f"{number} {what}" for what, number in outcomes.items()))
    for name, fit in fits.items():
        then, now = before.get(name), after.get(name)
        line = f"{name}: {fit.slope_mib_per_h:+.1f} ± {fit.standard_error:.1f} MiB/h"
        if then is not None and now is not None:
            line += (
                f"; at rest {then.memory_bytes >> 20} → {now.memory_bytes >> 20} MiB, files {then.num_files} →"
                f" {now.num_files}, sockets {then.num_sockets} → {now.num_sockets}, threads {then.num_threads} →"
                f" {now.num_threads}"
            )
        typer.echo(line)
    typer.echo(f"at rest before: {cluster_before}")
    typer.echo(f"at rest after: {cluster_after}")
    for problem in problems:
        typer.echo(f"problem: {problem}")
    return {
        "duration_s": duration_s,
        "warm_up_s": warm_up_s,
        "concurrency": concurrency,
        "outcomes": outcomes,
        "memory_fits": {name: asdict(fit) for name, fit in fits.items()},
        "memory_mib_by_minute": samples.memory_mib(every=round(60 / SAMPLE_INTERVAL_S)),
        "resources": {
            name: {"before": asdict(before[name]), "after": asdict(after[name])}
            for name in sorted(before.keys() & after.keys())
        },
        "cluster": {"before": asdict(cluster_before), "after": asdict(cluster_after)},
        "problems": problems,
    }


async def _traffic(
    wanted: list[Call], expected: list[Any], duration_s: float, concurrency: int, seed: int
) -> tuple[dict[str, int], list[str]]:
    """Call at random for so long; how the calls went, and each that did not go as it should, in words."""
    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    end_at = time.monotonic() + duration_s

    async def worker(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        while time.monotonic() < end_at:
            index = rng.randrange(len(wanted))
            stay_s = rng.uniform(0, MAX_STAY_S) if rng.random() < LEAVING_PROBABILITY else None
            try:
                async with asyncio.timeout(stay_s):
                    record = await call_once(URL, wanted[index], expected[index], [])
            except TimeoutError:
                outcomes["left"] += 1
            else:
                outcomes[record.outcome] += 1
                if record.outcome is not Outcome.EQUAL:
                    problems.append(f"{record.outcome}: {wanted[index]}: {record.detail}")
            await asyncio.sleep(rng.uniform(0, MAX_PAUSE_S))

    async with asyncio.TaskGroup() as tasks:
        for number in range(concurrency):
            tasks.create_task(worker(number))
    return dict(outcomes), problems


async def _sample(processes: Processes, samples: Samples) -> None:
    while True:
        samples.add(time.monotonic(), await asyncio.to_thread(by_process, processes))
        await asyncio.sleep(SAMPLE_INTERVAL_S)


if __name__ == "__main__":
    typer.run(main)
