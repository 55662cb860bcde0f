"""Load a model of GPT-J 6B's shape into CPU stage processes, generate with it, and hold their memory to the bound.

    python benchmarks/load_6b.py

It makes a checkpoint of random bfloat16 weights in a temporary directory (12 GB on disk, removed at the end) and needs
about 14 GB of memory. The stages are linked over ZeroMQ as in the service, without Ray. Exit status 1: a stage's peak
memory after loading was over its weights x 1.1 + 0.5 GB.
"""

import asyncio
import json
import multiprocessing
import shutil
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.model.checkpoint import INDEX_FILE, Checkpoint
from gptj_serve.model.config import GPTJConfig
from gptj_serve.pipeline.stage_loop import StageLoop
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.pipeline.step_links import StepLinks
from gptj_serve.planner import Model, Resources, plan
from gptj_serve.steps import MicroBatch, StepOutput
from gptj_serve.types import EngineRequest, SamplingParams, Task, TokenEvent

BLOCK_SIZE = 16
NUM_KV_TOKENS = 256
PROMPT = [464, 3290]
SHAPE_FIELDS = ("n_layer", "n_embd", "n_head", "rotary_dim", "vocab_size", "n_positions")
COLUMNS = ("layers", "weights GB", "peak after loading GB", "bound GB", "peak after generating GB", "loaded in s")


class LinkedStages:
    """Stage processes as a pipeline for the engine; a lost stage is not brought back."""

    def __init__(self, links: StepLinks) -> None:
        self._links = links

    async def run(self, microbatch: MicroBatch) -> StepOutput:
        return await self._links.run(microbatch)

    async def watch(self) -> None:
        await self._links.watch()

    async def recover(self) -> None:
        raise RuntimeError("a stage was lost")


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
        make_checkpoint(model, work)
        print(f"{model.num_parameters:,} random parameters written in {time.perf_counter() - started:.0f} s")
        raise typer.Exit(asyncio.run(load_and_generate(model, work, num_stages, num_tokens)))
    finally:
        shutil.rmtree(work)


def make_checkpoint(model: Model, directory: Path) -> None:
    """One shard per layer, and one for the embedding and the head each."""
    torch.manual_seed(0)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in model.shapes(range(model.config.n_layer)).items():
        part = ".".join(name.split(".")[: 2 if name.startswith("h.") else 1])
        shards.setdefault(part, {})[name if name.startswith("lm_head") else f"transformer.{name}"] = shape
    weight_map = {}
    for part, shapes in shards.items():
        file = f"model-{part}.safetensors"
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in shapes.items()}
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(shapes, file)
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {name: getattr(model.config, name) for name in SHAPE_FIELDS}
    (directory / "config.json").write_text(json.dumps({"model_type": "gptj", **config}))


async def load_and_generate(model: Model, directory: Path, num_stages: int, num_tokens: int) -> int:
    resources = Resources(num_stages=num_stages, dtype="bfloat16", block_size=BLOCK_SIZE, num_kv_tokens=NUM_KV_TOKENS)
    planned = plan(model, resources)
    context = multiprocessing.get_context("spawn")
    sockets = tempfile.mkdtemp(prefix="load-6b-sockets-")
    pipes, processes = [], []
    try:
        for stage in planned.stages:
            ours, theirs = context.Pipe()
            settings = (str(directory), stage.layers, planned.num_kv_blocks, num_stages, f"ipc://{sockets}")
            processes.append(context.Process(target=run_stage, args=(theirs, *settings), daemon=True))
            processes[-1].start()
            pipes.append(ours)
        loaded = [await asyncio.to_thread(pipe.recv) for pipe in pipes]
        links = StepLinks(None, step_timeout_s=600)
        results = links.bind(f"ipc://{sockets}/results")
        for pipe, following in zip(pipes, [stage["hidden"] for stage in loaded[1:]] + [results], strict=True):
            pipe.send(following)
        links.connect([stage["steps"] for stage in loaded])
        generated, token_s = await generate(model, links, planned.num_kv_blocks, num_stages, num_tokens)
        for pipe in pipes:
            pipe.send(None)
        peaks = [await asyncio.to_thread(pipe.recv) for pipe in pipes]
        links.close()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
        shutil.rmtree(sockets)
    print("  ".join(COLUMNS))
    over = False
    for stage, report, peak in zip(planned.stages, loaded, peaks, strict=True):
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
    model: Model, links: StepLinks, num_kv_blocks: int, num_stages: int, num_tokens: int
) -> tuple[list[int], float]:
    limits = SchedulerLimits(num_stages, 8, 64, model.config.n_positions)
    scheduler = Scheduler(limits, KVBlocks(num_kv_blocks, BLOCK_SIZE), frozenset())
    sampling = SamplingParams(max_new_tokens=num_tokens)
    request = EngineRequest(request_id="0", task=Task.GENERATE, prompt_token_ids=PROMPT, sampling=sampling)
    async with LocalEngine(scheduler, LinkedStages(links)) as engine:
        started = time.perf_counter()
        events = [event async for event in engine.submit(request)]
    assert all(isinstance(event, TokenEvent) for event in events), events
    return [event.token_id for event in events], (time.perf_counter() - started) / num_tokens


def run_stage(
    pipe: Connection,
    directory: str,
    span: range,
    num_kv_blocks: int,
    num_stages: int,
    address: str,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """A stage's process: load, tell where it listens, serve until told to stop, tell its peak memory."""
    torch.set_num_threads(max(1, multiprocessing.cpu_count() // num_stages))
    checkpoint = Checkpoint.open(Path(directory))
    spec = StageSpec(span, num_kv_blocks, BLOCK_SIZE, dtype, torch.device("cpu"), checkpoint.config.vocab_size)
    started = time.perf_counter()
    runner = StageRunner.load(checkpoint, spec)
    load_s = time.perf_counter() - started
    loop = StageLoop(runner, None)
    addresses = loop.bind(f"{address}/{span.start}")
    report = {"weight_bytes": runner.weight_bytes, "peak_bytes": peak_rss_bytes(), "load_s": load_s}
    pipe.send(report | addresses._asdict())
    loop.start(pipe.recv())
    pipe.recv()
    loop.stop()
    pipe.send(peak_rss_bytes())


def peak_rss_bytes() -> int:
    """Of this process since its start; `getrusage` would count what its parent had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    typer.run(main)
