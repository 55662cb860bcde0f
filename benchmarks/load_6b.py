"""Load a model of GPT-J 6B's shape into CPU stage processes, generate with it, and hold their memory to the bound.

    python -m benchmarks.load_6b

It makes a checkpoint of random bfloat16 weights in a temporary directory (12 GB on disk, removed at the end) and needs
about 14 GB of memory. The stages are linked over ZeroMQ as in the service, without Ray. Exit status 1: a stage's peak
memory after loading was over its weights x 1.1 + 0.5 GB.
"""

import asyncio
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.random_model import make_checkpoint
from benchmarks.stage_processes import LinkedStages, StageProcessConfig, linked_stages
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.model.config import GPTJConfig
from gptj_serve.pipeline.threads import threads_per_stage
from gptj_serve.planner import Model, Resources, plan
from gptj_serve.types import EngineRequest, SamplingParams, Task, TokenEvent

BLOCK_SIZE = 16
NUM_KV_TOKENS = 256
PROMPT = [464, 3290]
COLUMNS = ("layers", "weights GB", "peak after loading GB", "bound GB", "peak after generating GB", "loaded in s")


def main(
    num_layers: Annotated[int, typer.Option(help="28 is the 6B model; fewer for less memory.")] = 28,
    num_stages: int = 2,
    num_tokens: Annotated[int, typer.Option(help="How many to generate.")] = 8,
    directory: Annotated[
        Path | None, typer.Option(help="Where there are 12 GB of room. Default: for temporaries.")
    ] = None,
) -> None:
    work = Path(tempfile.mkdtemp(prefix="load-6b-", dir=directory))
    try:
        started = time.perf_counter()
        model = Model(GPTJConfig(n_layer=num_layers))
        make_checkpoint(model.config, work)
        print(f"{model.num_parameters:,} random parameters written in {time.perf_counter() - started:.0f} s")
        raise typer.Exit(asyncio.run(load_and_generate(model, work, num_stages, num_tokens)))
    finally:
        shutil.rmtree(work)


async def load_and_generate(model: Model, directory: Path, num_stages: int, num_tokens: int) -> int:
    resources = Resources(num_stages=num_stages, dtype="bfloat16", block_size=BLOCK_SIZE, num_kv_tokens=NUM_KV_TOKENS)
    planned = plan(model, resources)
    threads = threads_per_stage(num_stages)
    config = StageProcessConfig(directory, planned.num_kv_blocks, BLOCK_SIZE, torch.bfloat16, threads)
    async with linked_stages([stage.layers for stage in planned.stages], config) as pipeline:
        generated, token_s = await generate(model, pipeline, planned.num_kv_blocks, num_stages, num_tokens)
        peaks = await pipeline.ask("peak_bytes")
    print("  ".join(COLUMNS))
    over = False
    for stage, report, peak in zip(planned.stages, pipeline.loaded, peaks, strict=True):
        assert report["weight_bytes"] == stage.weight_bytes, "the planner counts other bytes than the stage holds"
        bound = 1.1 * stage.weight_bytes + 0.5e9
        over |= report["peak_bytes"] > bound
        gigabytes = [stage.weight_bytes / 1e9, report["peak_bytes"] / 1e9, bound / 1e9, peak / 1e9]
        cells = [f"{size:.2f}" for size in gigabytes] + [f"{report['load_s']:.0f}"]
        layers = f"{stage.layers.start}-{stage.layers.stop - 1}"
        print("  ".join(cell.rjust(len(title)) for cell, title in zip([layers, *cells], COLUMNS, strict=True)))
    print(f"generated {generated} at {token_s:.2f} s per token")
    return int(over)


async def generate(
    model: Model, pipeline: LinkedStages, num_kv_blocks: int, num_stages: int, num_tokens: int
) -> tuple[list[int], float]:
    limits = SchedulerLimits(num_stages, 8, 64, model.config.n_positions)
    scheduler = Scheduler(limits, KVBlocks(num_kv_blocks, BLOCK_SIZE), frozenset())
    sampling = SamplingParams(max_new_tokens=num_tokens)
    request = EngineRequest(request_id="0", task=Task.GENERATE, prompt_token_ids=PROMPT, sampling=sampling)
    async with LocalEngine(scheduler, pipeline) as engine:
        started = time.perf_counter()
        events = [event async for event in engine.submit(request)]
    assert all(isinstance(event, TokenEvent) for event in events), events
    return [event.token_id for event in events], (time.perf_counter() - started) / num_tokens


if __name__ == "__main__":
    typer.run(main)
