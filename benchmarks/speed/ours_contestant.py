"""Our engine in its process: `LocalEngine` over an in-process pipeline, tokens timed as their events come."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.speed.contestants import Contestant, Settings
from benchmarks.speed.streams import Request, Stream
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.partition import head_cost, partition
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.pipeline.stage_status import describe_stage
from gptj_serve.types import EngineRequest, FailureEvent, SamplingParams, Task, TokenEvent

BLOCK_SIZE = 16


def load(contestant: Contestant, settings: Settings) -> "Ours":
    torch.set_num_threads(max(1, settings.threads // settings.num_stages))  # of each stage's thread
    checkpoint = Checkpoint.open(settings.directory)
    config = checkpoint.config
    runners = [
        StageRunner.load(
            checkpoint,
            StageSpec(
                span,
                settings.num_kv_tokens // BLOCK_SIZE,
                BLOCK_SIZE,
                getattr(torch, contestant.dtype),
                torch.device("cpu"),
                config.vocab_size,
                quantization=contestant.quantization,
                kernels=contestant.kernels,
            ),
        )
        for span in partition(config.n_layer, settings.num_stages, head_cost(config))
    ]
    return Ours(settings, runners)


class Ours:
    def __init__(self, settings: Settings, runners: Sequence[StageRunner]) -> None:
        self._settings = settings
        self._pipeline = InProcessPipeline(runners)
        self._runners = runners
        self.facts = {"stages": [describe_stage(runner) for runner in runners]}

    def generate(self, requests: Sequence[Request], max_batch: int, limit_s: float) -> list[Stream]:
        for runner in self._runners:
            runner.restart()  # the numbers of microbatches begin anew
        return asyncio.run(self._generate(requests, max_batch, limit_s))

    async def _generate(self, requests: Sequence[Request], max_batch: int, limit_s: float) -> list[Stream]:
        async with LocalEngine(new_scheduler(self._settings, max_batch), self._pipeline) as engine:
            return await serve(engine, requests, limit_s)

    def stages(self) -> list[dict[str, Any]]:
        return self._pipeline.stage_statuses()


def new_scheduler(settings: Settings, max_batch: int) -> Scheduler:
    n_positions = settings.config.n_positions
    limits = SchedulerLimits(settings.num_stages, max_batch, settings.max_microbatch_tokens, n_positions)
    return Scheduler(limits, KVBlocks(settings.num_kv_tokens // BLOCK_SIZE, BLOCK_SIZE), frozenset())


async def serve(engine: LocalEngine, requests: Sequence[Request], limit_s: float) -> list[Stream]:
    """Each request is submitted when it comes; what is unfinished at `limit_s` is given up."""
    streams = [Stream(request.arrival_s) for request in requests]
    began_at = time.perf_counter()

    async def follow(index: int, request: Request, stream: Stream) -> None:
        if request.arrival_s:
            await asyncio.sleep(began_at + request.arrival_s - time.perf_counter())
        sampling = SamplingParams(max_new_tokens=request.num_new_tokens, ignore_eos=True)
        wanted = EngineRequest(
            request_id=str(index), task=Task.GENERATE, prompt_token_ids=request.prompt, sampling=sampling
        )
        async for event in engine.submit(wanted):
            if isinstance(event, FailureEvent):
                raise RuntimeError(event.message)
            if isinstance(event, TokenEvent):
                stream.add(time.perf_counter() - began_at, event.token_id)

    pairs = zip(requests, streams, strict=True)
    tasks = [asyncio.create_task(follow(index, *pair)) for index, pair in enumerate(pairs)]
    _, late = await asyncio.wait(tasks, timeout=limit_s)
    for task in late:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):  # a cancelled one is none
            raise end
    return streams
