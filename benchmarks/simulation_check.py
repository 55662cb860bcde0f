"""How far the simulation is from the truth: `python -m benchmarks.simulation_check --trace CSV`.

The demo over two stages: its cost model is calibrated here, then the same requests are served and simulated: with an
engine in this process, and over HTTP with `serve run` (port 8000), whose engine's coefficients are calibrated with
streams of its own. The loads are others than those that calibrate: a trace's lengths, all at once, and at a steady
share of what that came to. Client, Ray and stages share the machine's cores; what else runs on them shows as an error.
"""

# ruff: noqa: E402  # the environment must be set before torch is loaded
from gptj_serve.environment import keep_openmp_from_spinning

keep_openmp_from_spinning()  # as in the service

import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.serve_run import http_stream, running_service
from gptj_serve.config import ServiceConfig
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.stage_runner import StageRunner
from gptj_serve.planner import Plan, plan_service
from gptj_serve.profiling.deployment import DEMO
from gptj_serve.profiling.load import PlannedRequest, trace_requests
from gptj_serve.profiling.session import stage_specs
from gptj_serve.simulation.calibration import FULL, calibrate, median_round
from gptj_serve.simulation.cost_model import CostModel
from gptj_serve.simulation.fit import fit_engine
from gptj_serve.simulation.load import make_load
from gptj_serve.simulation.outcomes import Outcomes
from gptj_serve.simulation.report import Targets, figures
from gptj_serve.simulation.service import Deployment, SimulatedService
from gptj_serve.types import EngineRequest, SamplingParams, Task, TokenEvent

Stream = Callable[[list[int], int], AsyncIterator[int]]
"""Of a prompt and a number of new tokens: how many tokens have come, each time that some do."""

console = Console(width=110)


def main(
    trace: Annotated[Path, typer.Option(help="CSV of arrival, prompt tokens, output tokens.")],
    num_requests: Annotated[int, typer.Option(help="Of each load.")] = 120,
    share: Annotated[float, typer.Option(help="Of the burst's requests/s, for the steady load.")] = 0.6,
    http: Annotated[bool, typer.Option(help="Also over HTTP; needs port 8000.")] = True,
    cost: Annotated[Path | None, typer.Option(help="Cost model of the demo over two stages, already measured.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    checkpoint = Checkpoint.open(DEMO.checkpoint_dir)
    plan = plan_service(DEMO.pipeline, checkpoint)
    limits = SchedulerLimits(
        DEMO.pipeline.num_stages,
        DEMO.pipeline.scheduler.max_num_sequences,
        DEMO.pipeline.scheduler.max_microbatch_tokens,
        checkpoint.config.n_positions,
    )
    model = calibrate(DEMO) if cost is None else CostModel.read(cost)
    planned = trace_requests(trace, num_requests, checkpoint.config.n_positions)
    check = Check(limits, plan, planned, share)
    rows = asyncio.run(in_process(check, model, checkpoint))
    if http:
        rows += over_http(check, model, DEMO)
    for row in rows:
        print_row(row)
    if output is not None:
        output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Check:
    limits: SchedulerLimits
    plan: Plan
    planned: list[PlannedRequest]
    share: float

    async def run(self, name: str, stream: Stream, model: CostModel) -> list[dict[str, Any]]:
        """The loads, served and simulated."""
        burst = [replace(request, arrival_s=0.0) for request in self.planned]
        served = await serve(burst, stream)
        requests_per_s = self.share * len(burst) / served["time, s"]
        chance = random.Random(0)
        at_s = 0.0
        steady = []
        for request in self.planned:
            steady.append(replace(request, arrival_s=at_s))
            at_s += chance.expovariate(requests_per_s)
        steady_live = await serve(steady, stream)
        rows: list[dict[str, Any]] = [
            {"load": "all at once", "live": served, "simulated": self.simulate(burst, model)},
            {
                "load": f"{requests_per_s:.1f} requests/s",
                "live": steady_live,
                "simulated": self.simulate(steady, model),
            },
        ]
        return [{"over": name, "cost": model.model_dump()} | row for row in rows]

    def simulate(self, planned: Sequence[PlannedRequest], model: CostModel) -> dict[str, float]:
        block_size = self.plan.resources.block_size
        costs = model.pipeline(self.limits.num_stages)
        deployment = Deployment(self.limits, self.plan.num_kv_blocks, block_size, True, costs, 1)
        load = make_load(list(planned))
        outcomes = Outcomes(len(load))
        result = SimulatedService(deployment, outcomes).run(load)
        found = figures(outcomes, result, Targets(1.0, 1.0), model.request_s, 0.0)
        end_s = max(outcomes.last_s) + model.request_s
        return {
            "time, s": end_s,
            "tokens/s": sum(outcomes.num_tokens) / end_s,
            "first token p50, ms": 1e3 * found.first_token_p50_s,
            "first token p99, ms": 1e3 * found.first_token_p99_s,
            "between tokens p50, ms": 1e3 * found.between_tokens_p50_s,
            "between tokens p99, ms": 1e3 * found.between_tokens_p99_s,
            "whole answer p50, ms": 1e3 * found.whole_p50_s,
            "whole answer p99, ms": 1e3 * found.whole_p99_s,
        }


async def serve(planned: Sequence[PlannedRequest], stream: Stream) -> dict[str, float]:
    """Each when it is due; the same figures as of a simulation."""
    began_at = time.perf_counter()

    async def follow(request: PlannedRequest) -> list[float]:
        await asyncio.sleep(max(0.0, began_at + request.arrival_s - time.perf_counter()))
        prompt = random_prompt(request.num_prompt_tokens)
        times: list[float] = []
        async for count in stream(prompt, request.num_new_tokens):
            times += [time.perf_counter() - began_at] * count
        return times

    found = await asyncio.gather(*map(follow, planned))
    end_s = max(times[-1] for times in found)
    firsts = [times[0] - request.arrival_s for times, request in zip(found, planned, strict=True)]
    wholes = [times[-1] - request.arrival_s for times, request in zip(found, planned, strict=True)]
    gaps = np.concatenate([np.diff(times) for times in found])
    return {
        "time, s": end_s,
        "tokens/s": sum(request.num_new_tokens for request in planned) / end_s,
        "first token p50, ms": 1e3 * float(np.percentile(firsts, 50)),
        "first token p99, ms": 1e3 * float(np.percentile(firsts, 99)),
        "between tokens p50, ms": 1e3 * float(np.percentile(gaps, 50)),
        "between tokens p99, ms": 1e3 * float(np.percentile(gaps, 99)),
        "whole answer p50, ms": 1e3 * float(np.percentile(wholes, 50)),
        "whole answer p99, ms": 1e3 * float(np.percentile(wholes, 99)),
    }


def random_prompt(num_tokens: int) -> list[int]:
    """None is met twice."""
    return random.choices(range(1, 4000), k=num_tokens)


# ------------------------------------------------------------------------------------------------ in this process


async def in_process(check: Check, model: CostModel, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    torch.set_num_threads(int(model.notes["threads_per_stage"]))
    specs = stage_specs(DEMO.pipeline, check.plan, checkpoint.config.vocab_size)
    pipeline = InProcessPipeline([StageRunner.load(checkpoint, spec) for spec in specs])
    blocks = KVBlocks(check.plan.num_kv_blocks, check.plan.resources.block_size)
    try:
        async with LocalEngine(Scheduler(check.limits, blocks, frozenset()), pipeline) as engine:
            numbers = iter(range(10**9))

            async def stream(prompt: list[int], num_new: int) -> AsyncIterator[int]:
                request = EngineRequest(
                    request_id=str(next(numbers)),
                    task=Task.GENERATE,
                    prompt_token_ids=prompt,
                    sampling=SamplingParams(max_new_tokens=num_new, ignore_eos=True),
                )
                async with aclosing(engine.submit(request)) as events:
                    async for event in events:
                        assert isinstance(event, TokenEvent), event
                        yield 1

            await serve(check.planned[:4], stream)  # to warm up
            return await check.run("an engine in this process", stream, model)
    finally:
        pipeline.close()


# ------------------------------------------------------------------------------------------------ over HTTP


def over_http(check: Check, model: CostModel, config: ServiceConfig) -> list[dict[str, Any]]:
    async def stream(prompt: list[int], num_new: int) -> AsyncIterator[int]:
        async for chunk in http_stream(prompt, num_new):
            yield chunk.count(b"data: {")

    async def random_stream(num_prompt_tokens: int, num_new_tokens: int) -> AsyncGenerator[int]:
        async for count in stream(random_prompt(num_prompt_tokens), num_new_tokens):
            yield count

    async def measured() -> list[dict[str, Any]]:
        rounds = [
            await median_round(asked, random_stream, FULL.num_rounds)
            for asked in FULL.asked(check.limits.max_sequence_tokens)
        ]
        plan = check.plan
        calibrated = fit_engine(
            model, check.limits, plan.num_kv_blocks, plan.resources.block_size, rounds, scales_stages=False
        )
        console.print(
            f"over HTTP: engine_step_s {calibrated.engine_step_s * 1e6:,.0f} µs, engine_row_s "
            f"{calibrated.engine_row_s * 1e6:,.0f} µs, request_s {calibrated.request_s * 1e3:.1f} ms",
            highlight=False,
        )
        return await check.run("HTTP", stream, calibrated)

    with (
        tempfile.TemporaryDirectory(prefix="simulation-check-") as work,
        running_service(config.checkpoint_dir, config.pipeline.num_stages, Path(work)),
    ):
        return asyncio.run(measured())


def print_row(row: dict[str, Any]) -> None:
    table = Table("", "live", "simulated", "error", title=f"{row['over']}: {row['load']}")
    for name, live in row["live"].items():
        simulated = row["simulated"][name]
        table.add_row(name, f"{live:,.1f}", f"{simulated:,.1f}", f"{simulated / live - 1:+.0%}" if live else "")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
