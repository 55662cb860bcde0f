"""What streaming over HTTP and Ray Serve costs beside the engine alone: `python -m benchmarks.streaming`.

The engine alone is the same engine in this process over the same number of stage processes, linked over ZeroMQ as in
the service, without Ray, HTTP and text. The service adds the engine's replica, the ingress, Serve's proxy and its
controller, and this client, which counts bytes and parses nothing; all share the machine's cores. Each round measures
both, in turns: the share is the median of the rounds' tokens/s over HTTP by those of the engine. It starts `serve run`
on port 8000 and stops it at the end.

`--tokenizer DIRECTORY` makes a random model of 405 M parameters with that directory's tokenizer.json and measures it
instead of the demo.
"""

import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.number_lists import positive_numbers
from benchmarks.serve_run import http_stream, make_model, running_service
from benchmarks.stage_processes import StageProcessConfig, linked_stages
from gptj_serve.config import PipelineConfig, ServiceConfig
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.threads import threads_per_stage
from gptj_serve.planner import plan_service
from gptj_serve.types import EngineRequest, FailureEvent, SamplingParams, Task

NUM_PROMPT_TOKENS = 16
console = Console(width=110)


def main(
    tokenizer: Annotated[Path | None, typer.Option(help="Directory of a tokenizer.json: 405 M model.")] = None,
    num_stages: Annotated[int, typer.Option(min=1)] = 2,
    num_tokens: Annotated[int, typer.Option(min=1, help="Of each stream.")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    streams: Annotated[str, typer.Option(help="How many at a time.")] = "1,16,64",
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG to draw; needs matplotlib.")] = None,
) -> None:
    counts = positive_numbers("--streams", streams, int)
    with tempfile.TemporaryDirectory(prefix="streaming-") as work:
        directory = ServiceConfig().checkpoint_dir if tokenizer is None else make_model(tokenizer, Path(work))
        with running_service(directory, num_stages, Path(work)):
            rates = asyncio.run(compare(directory, num_stages, num_tokens, rounds, counts))
    if plot is not None:
        draw(plot, counts, rates)


async def compare(
    directory: Path, num_stages: int, num_tokens: int, rounds: int, streams: list[int]
) -> list[tuple[float, float]]:
    """Prints the table; returns for each number of streams tokens/s of the engine and over HTTP."""
    medians = []
    table = Table("streams", "engine tokens/s", "HTTP tokens/s", "share", title=f"{num_tokens} tokens each")
    async with engine_alone(directory, num_stages) as engine:
        sources = (
            lambda seed: engine_stream(engine, seed, num_tokens),
            lambda seed: http_stream(prompt(seed), num_tokens),
        )
        for count in streams:
            rates: list[tuple[float, float]] = []
            for index in range(-1, rounds):  # the first to warm up
                alone, over_http = [await rate(source, count, num_tokens, index) for source in sources]
                rates += [(alone, over_http)] if index >= 0 else []
            alone, over_http = (statistics.median(column) for column in zip(*rates, strict=True))
            medians.append((alone, over_http))
            share = statistics.median(http / engine for engine, http in rates)
            table.add_row(str(count), f"{alone:.1f}", f"{over_http:.1f}", f"{share:.2f}")
        firsts: list[tuple[float, float]] = []
        for index in range(21):
            pair = [await first_token_s(engine_stream(engine, f"alone {index}", 2))]
            pair.append(await first_token_s(http_stream(prompt(f"alone {index}"), 2)))
            firsts.append((pair[0], pair[1]))
    console.print(table)
    alone, over_http = (1000 * statistics.median(column) for column in zip(*firsts[1:], strict=True))
    console.print(
        f"first token at idle: engine {alone:.1f} ms, HTTP {over_http:.1f} ms, {over_http - alone:.1f} ms more"
    )
    return medians


def draw(file: Path, counts: list[int], rates: list[tuple[float, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.subplots()
    places = range(len(counts))
    for offset, column, name, colour in ((-0.2, 0, "engine alone", "#9aa5a0"), (0.2, 1, "over HTTP", "#12776b")):
        bars = axes.bar([place + offset for place in places], [pair[column] for pair in rates], 0.38, color=colour)
        bars.set_label(name)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.set_xticks(places, [f"{count} stream{'s' * (count > 1)}" for count in counts])
    axes.set_ylabel("generated tokens/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(file, dpi=150)


async def rate(make_stream: Callable[[str], AsyncIterator[object]], count: int, num_tokens: int, index: int) -> float:
    """Tokens/s of `count` streams at once; no two rounds of them have a prompt in common."""

    async def drain(stream: AsyncIterator[object]) -> None:
        async for _ in stream:
            pass

    began = time.perf_counter()
    await asyncio.gather(*[drain(make_stream(f"{count} {index} {number}")) for number in range(count)])
    return count * num_tokens / (time.perf_counter() - began)


async def first_token_s(stream: AsyncGenerator[object]) -> float:
    began = time.perf_counter()
    await anext(stream)
    elapsed = time.perf_counter() - began
    async for _ in stream:  # to the end, so that the next one meets an idle engine
        pass
    return elapsed


def prompt(seed: str) -> list[int]:
    return random.Random(seed).choices(range(1, 4000), k=NUM_PROMPT_TOKENS)


# ------------------------------------------------------------------------------------------------ the engine alone


async def engine_stream(engine: LocalEngine, seed: str, num_tokens: int) -> AsyncGenerator[object]:
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    request = EngineRequest(request_id=seed, task=Task.GENERATE, prompt_token_ids=prompt(seed), sampling=sampling)
    async for event in engine.submit(request):
        if isinstance(event, FailureEvent):
            raise RuntimeError(event.message)
        yield event


@contextlib.asynccontextmanager
async def engine_alone(directory: Path, num_stages: int) -> AsyncIterator[LocalEngine]:
    """With the service's own plan and limits."""
    checkpoint = Checkpoint.open(directory)
    config = PipelineConfig(num_stages=num_stages)
    planned = plan_service(config, checkpoint)
    block_size = config.kv_cache.block_size
    threads = threads_per_stage(num_stages)
    stages = StageProcessConfig(directory, planned.num_kv_blocks, block_size, torch.float32, threads)
    async with linked_stages([stage.layers for stage in planned.stages], stages) as pipeline:
        limits = SchedulerLimits(
            num_stages,
            config.scheduler.max_num_sequences,
            config.scheduler.max_microbatch_tokens,
            checkpoint.config.n_positions,
        )
        scheduler = Scheduler(limits, KVBlocks(planned.num_kv_blocks, block_size), frozenset())
        async with LocalEngine(scheduler, pipeline) as engine:
            yield engine


if __name__ == "__main__":
    typer.run(main)
