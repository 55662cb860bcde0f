"""Stages linked over ZeroMQ in this process: what `RayPipeline` does with actors, done with objects."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial

import torch

from gptj_serve.config import HandoffKind
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.errors import PipelineError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.partition import partition
from gptj_serve.pipeline.sockets import CurveKeys
from gptj_serve.pipeline.stage_loop import StageLoop
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.pipeline.step_links import StepLinks
from gptj_serve.steps import MicroBatch, StepOutput
from gptj_serve.types import EngineRequest, SamplingParams, Task, TokenEvent, Warpers

NUM_BLOCKS, BLOCK_SIZE = 64, 4


def make_runners(checkpoint: Checkpoint, num_stages: int) -> list[StageRunner]:
    return [
        StageRunner.load(
            checkpoint, StageSpec(span, NUM_BLOCKS, BLOCK_SIZE, torch.float32, torch.device("cpu"), 97)
        )
        for span in partition(checkpoint.config.n_layer, num_stages, 1.0)
    ]  # fmt: skip


class LinkedPipeline:
    """`where` gives the address to bind for a name, each time it is asked."""

    def __init__(
        self,
        runners: Sequence[StageRunner],
        where: Callable[[str], str],
        new_keys: Callable[[], CurveKeys | None],
        step_timeout_s: float = 20.0,
        handoff: HandoffKind = "zmq",
    ) -> None:
        self._handoff = handoff
        self._runners = runners
        self._where = where
        self._new_keys = new_keys
        self._step_timeout_s = step_timeout_s
        self.num_recoveries = 0
        self.num_steps = 0
        self._link()

    def _link(self) -> None:
        keys = self._new_keys()
        self.links = StepLinks(keys, self._step_timeout_s)
        self.loops = [StageLoop(runner, keys) for runner in self._runners]
        self.addresses = [loop.bind(self._where(str(index)), self._handoff) for index, loop in enumerate(self.loops)]
        self.results_address = self.links.bind(self._where("results"))

    def connect(self) -> None:
        event_loop = asyncio.get_running_loop()
        self._stage_failed = event_loop.create_future()
        for loop in self.loops:
            loop.failure.add_done_callback(partial(self._on_failure, event_loop, self._stage_failed))
        for loop, address in zip(self.loops, self.addresses[1:], strict=False):
            loop.start(address.hidden, self._handoff, address.tensors)
        self.loops[-1].start(self.results_address)
        self.links.connect([address.steps for address in self.addresses])

    @staticmethod
    def _on_failure(
        event_loop: asyncio.AbstractEventLoop, told: asyncio.Future[PipelineError], failure: Future[None]
    ) -> None:
        """In the thread of a stage's loop, or of its link watch."""
        error = failure.exception()
        if error is not None and not event_loop.is_closed():
            event_loop.call_soon_threadsafe(lambda: told.done() or told.set_result(PipelineError(repr(error))))

    async def run(self, microbatch: MicroBatch) -> StepOutput:
        output = await self.links.run(microbatch)
        self.num_steps += 1
        return output

    async def watch(self) -> None:
        """Raise what the links failed with, or a stage."""
        links = asyncio.create_task(self.links.watch())
        try:
            await asyncio.wait({links, self._stage_failed}, return_when=asyncio.FIRST_COMPLETED)
            if self._stage_failed.done():
                raise self._stage_failed.result()
            await links
        finally:
            links.cancel()

    async def recover(self) -> None:
        """New links around the same stages."""
        await asyncio.to_thread(self.close)
        self._link()
        self.connect()
        self.num_recoveries += 1

    def stage_statuses(self) -> list[dict[str, object]]:
        return []

    def close(self) -> None:
        self.links.close()
        for loop in self.loops:
            loop.stop()


@asynccontextmanager
async def open_links(pipeline: LinkedPipeline) -> AsyncIterator[LinkedPipeline]:
    pipeline.connect()
    try:
        yield pipeline
    finally:
        await asyncio.to_thread(pipeline.close)


async def generate_all(
    checkpoint: Checkpoint, pipeline: LinkedPipeline | InProcessPipeline, num_stages: int, max_new_tokens: int = 12,
    *, ahead: bool = False,
) -> list[list[int]]:  # fmt: skip
    """The tokens of ten requests at a time."""
    limits = SchedulerLimits(num_stages, 16, 24, checkpoint.config.n_positions, schedules_ahead=ahead)
    scheduler = Scheduler(limits, KVBlocks(NUM_BLOCKS, BLOCK_SIZE), frozenset())

    async def generate(engine: LocalEngine, n: int) -> list[int]:
        sampling = SamplingParams(max_new_tokens=max_new_tokens, warpers=Warpers(temperature=n % 2), seed=n)
        prompt = [(5 * n + i) % 90 + 1 for i in range(3 * n + 1)]
        request = EngineRequest(request_id=str(n), task=Task.GENERATE, prompt_token_ids=prompt, sampling=sampling)
        return [event.token_id async for event in engine.submit(request) if isinstance(event, TokenEvent)]

    async with LocalEngine(scheduler, pipeline) as engine:
        return await asyncio.gather(*[generate(engine, n) for n in range(10)])
