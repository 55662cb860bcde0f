"""The engine over stages in this process, and how long it takes."""

import asyncio
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.model.config import GPTJConfig
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.stage_runner import StageRunner
from gptj_serve.types import BeamEvent, BeamParams, EngineRequest, SamplingParams, Task, TokenEvent

MakeRunners = Callable[[int], Sequence[StageRunner]]
"""From a number of stages."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Of all engines here."""

    config: GPTJConfig
    num_kv_blocks: int
    block_size: int
    max_num_sequences: int
    max_microbatch_tokens: int


@dataclass(slots=True)
class Times:
    """Of a batch that comes at once, in seconds from then."""

    firsts: list[float] = field(default_factory=list)  # first tokens
    lasts: list[float] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / max(self.lasts)

    @property
    def step_s(self) -> float:
        """Between two tokens of a sequence."""
        per_sequence = self.num_tokens // len(self.firsts) - 1
        spans = (last - first for first, last in zip(self.firsts, self.lasts, strict=True))
        return statistics.median(spans) / per_sequence


class Engines:
    """One pipeline at a time: each number of stages has weights of its own."""

    def __init__(self, setup: Setup, make_runners: MakeRunners) -> None:
        self._setup = setup
        self._make_runners = make_runners
        self._num_stages = 0
        self._pipeline: InProcessPipeline | None = None

    def close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
        self._pipeline, self._num_stages = None, 0
        gc.collect()  # weights and KV pool, before others are made

    def pipeline(self, num_stages: int) -> InProcessPipeline:
        if num_stages != self._num_stages:
            self.close()
            self._pipeline = InProcessPipeline(self._make_runners(num_stages))
            self._num_stages = num_stages
        assert self._pipeline is not None
        return self._pipeline

    def run(self, prompts: Sequence[Sequence[int]], num_new: int, *, num_stages: int = 1, num_beams: int = 1) -> Times:
        return asyncio.run(self._run(prompts, num_new, num_stages, num_beams))

    async def _run(self, prompts: Sequence[Sequence[int]], num_new: int, num_stages: int, num_beams: int) -> Times:
        setup = self._setup
        pipeline = self.pipeline(num_stages)
        await pipeline.recover()  # microbatches are counted from 0 again
        limits = SchedulerLimits(
            num_stages,
            setup.max_num_sequences,
            setup.max_microbatch_tokens,
            setup.config.n_positions,
            schedules_ahead=num_stages == 1,
        )
        blocks = KVBlocks(setup.num_kv_blocks, setup.block_size, reuse_prefixes=False)
        times = Times()
        async with LocalEngine(Scheduler(limits, blocks, frozenset()), pipeline) as engine:
            started = time.perf_counter()

            async def one(index: int, prompt: Sequence[int]) -> None:
                beams = BeamParams(num_beams=num_beams) if num_beams > 1 else None
                params = SamplingParams(max_new_tokens=num_new, ignore_eos=True, beams=beams)
                request = EngineRequest(
                    request_id=str(index), task=Task.GENERATE, prompt_token_ids=list(prompt), sampling=params
                )
                first, last, num_tokens = 0.0, 0.0, 0
                async for event in engine.submit(request):
                    assert isinstance(event, TokenEvent | BeamEvent), event
                    last = time.perf_counter() - started
                    first = first or last
                    num_tokens += 1 if isinstance(event, TokenEvent) else num_new
                times.firsts.append(first)
                times.lasts.append(last)
                times.num_tokens += num_tokens

            await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))
        return times
