"""A pipeline of stage processes, linked as in the service, without Ray."""

import asyncio
import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.stage_environment import stage_environment
from gptj_serve.config import HandoffKind
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.stage_loop import StageLoop
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.pipeline.step_links import StepLinks
from gptj_serve.pipeline.step_meter import StepMeter
from gptj_serve.steps import MicroBatch, StepOutput


@dataclass(frozen=True, slots=True)
class StageProcessConfig:
    """What all stages of a pipeline have in common."""

    directory: Path
    num_kv_blocks: int
    block_size: int
    dtype: torch.dtype
    threads: int  # of each stage
    handoff: HandoffKind = "shared_memory"


class LinkedStages:
    """Stage processes as a pipeline for the engine; a lost stage is not brought back."""

    def __init__(self, links: StepLinks, pipes: Sequence[Connection], loaded: Sequence[dict[str, Any]]) -> None:
        self._links = links
        self._pipes = pipes
        self.loaded = loaded  # of each stage: weight_bytes, peak_bytes and load_s

    async def run(self, microbatch: MicroBatch) -> StepOutput:
        return await self._links.run(microbatch)

    async def watch(self) -> None:
        await self._links.watch()

    async def recover(self) -> None:
        raise RuntimeError("a stage was lost")

    def stage_statuses(self) -> list[dict[str, Any]]:
        return []

    async def ask(self, what: str) -> list[Any]:
        """Of each stage: its `status` (as `StepMeter.status`), or its `peak_bytes` so far."""
        for pipe in self._pipes:
            with contextlib.suppress(ConnectionError):  # what became of it is told below
                pipe.send(what)
        return await _answers(self._pipes)


@contextlib.asynccontextmanager
async def linked_stages(spans: Sequence[range], config: StageProcessConfig) -> AsyncIterator[LinkedStages]:
    context = multiprocessing.get_context("spawn")
    sockets = tempfile.mkdtemp(prefix="stages-")
    pipes, processes = [], []
    try:
        for span in spans:
            ours, theirs = context.Pipe()
            process = context.Process(target=run_stage, args=(theirs, span, config, f"ipc://{sockets}"), daemon=True)
            with stage_environment():
                process.start()
            theirs.close()  # so that a stage that dies is noticed
            processes.append(process)
            pipes.append(ours)
        loaded = await _answers(pipes)
        links = StepLinks(None, step_timeout_s=600)
        results = links.bind(f"ipc://{sockets}/results")
        nexts = [(stage["hidden"], config.handoff, stage["tensors"]) for stage in loaded[1:]] + [(results, "zmq", "")]
        for pipe, following in zip(pipes, nexts, strict=True):
            pipe.send(following)
        links.connect([stage["steps"] for stage in loaded])
        try:
            yield LinkedStages(links, pipes, loaded)
        finally:
            links.close()
    finally:
        for process in processes:
            process.kill()
            process.join()
        shutil.rmtree(sockets)


async def _answers(pipes: Sequence[Connection]) -> list[Any]:
    """Of all stages. Raises `RuntimeError` for one that has ended."""
    answers = []
    for index, pipe in enumerate(pipes):
        try:
            answers.append(await asyncio.to_thread(pipe.recv))
        except (EOFError, ConnectionError):
            raise RuntimeError(f"the process of stage {index} has ended; what it printed says why") from None
    return answers


def run_stage(pipe: Connection, span: range, config: StageProcessConfig, address: str) -> None:
    """A stage's process: load, tell where it listens, serve until it is killed, and answer what `ask` sends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    torch.set_num_threads(config.threads)
    checkpoint = Checkpoint.open(config.directory)
    device = torch.device("cpu")
    spec = StageSpec(span, config.num_kv_blocks, config.block_size, config.dtype, device, checkpoint.config.vocab_size)
    started = time.perf_counter()
    runner = StageRunner.load(checkpoint, spec)
    load_s = time.perf_counter() - started
    meter = StepMeter()
    loop = StageLoop(runner, None, meter)
    addresses = loop.bind(f"{address}/{span.start}", config.handoff)
    report = {"weight_bytes": runner.weight_bytes, "peak_bytes": peak_rss_bytes(), "load_s": load_s}
    pipe.send(report | addresses._asdict())
    loop.failure.add_done_callback(lambda failure: os._exit(1))  # the engine sees its links cut
    loop.start(*pipe.recv())
    answers = {"status": meter.status, "peak_bytes": peak_rss_bytes}
    while True:
        pipe.send(answers[pipe.recv()]())


def peak_rss_bytes() -> int:
    """Of this process since its start; `getrusage` would count what its parent had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
