"""A profile of one engine in this process, with the stages, limits and threads of a deployment's config."""

import asyncio
import math
import os
from collections.abc import Iterator
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

import torch

from gptj_serve.config import PipelineConfig, ServiceConfig
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import SchedulerLimits
from gptj_serve.engine.timeline import Timeline
from gptj_serve.errors import ConfigError, GPTJServeError, OverloadedError, RequestFailedError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.stage_runner import StageSpec
from gptj_serve.planner import Plan, plan_service
from gptj_serve.profiling.load import Load, PlannedRequest
from gptj_serve.profiling.operators import ProfiledRunner, operator_profiler, operators_in
from gptj_serve.profiling.recording import RecordingMeter, RecordingScheduler
from gptj_serve.profiling.summary import ProfileSummary, scheduler_s_per_step, summarize_stage
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import EngineStats, FailureEvent

WARM_UP = PlannedRequest(0.0, num_prompt_tokens=2, num_new_tokens=2)
"""Before the profile begins: what is done only once, at first use, says nothing of later steps."""


@dataclass(frozen=True, slots=True)
class Profile:
    timeline: Timeline
    summary: ProfileSummary


class Session:
    """The engine of a config, loaded. Raises `ConfigError` or `CheckpointError` for what can't be served like that.

    Only generation is profiled: task heads are left out.
    """

    def __init__(self, config: ServiceConfig) -> None:
        pipeline = config.pipeline
        self._checkpoint = Checkpoint.open(config.checkpoint_dir)
        if "lm_head" not in self._checkpoint.heads:
            raise ConfigError(f"checkpoint={config.checkpoint!r}: has no lm_head, and a profile is of generation")
        self._plan = plan_service(pipeline, self._checkpoint)
        num_token_ids = Tokenizer.from_directory(config.checkpoint_dir).num_token_ids
        self._num_token_ids = min(num_token_ids, self._checkpoint.config.vocab_size)
        self._config = pipeline
        torch.set_num_threads(pipeline.stage.num_threads or max(1, len(os.sched_getaffinity(0)) // pipeline.num_stages))
        self._runners = [
            ProfiledRunner.load(self._checkpoint, spec)
            for spec in stage_specs(pipeline, self._plan, self._num_token_ids)
        ]

    @property
    def max_sequence_tokens(self) -> int:
        return self._checkpoint.config.n_positions

    @property
    def dtype(self) -> str:
        return self._plan.resources.dtype

    async def profile(self, load: Load, *, with_operators: bool = False) -> Profile:
        """Serve the load and end. Raises `InvalidRequestError` where a request can't be served at all."""
        meters = [RecordingMeter() for _ in self._runners]
        pipeline = InProcessPipeline(self._runners, meters)
        scheduler = self._scheduler()
        profiler = operator_profiler() if with_operators else None
        try:
            async with LocalEngine(scheduler, pipeline) as engine:
                await self._serve(engine, Load([WARM_UP], None), "warm-up")
                before = engine.stats()
                scheduler.begin()
                with profiler or nullcontext():
                    num_refused = await self._serve(engine, load, "request")
                after = engine.stats()
        finally:
            pipeline.close()
        timeline = scheduler.timeline(meters)
        layers = [runner.spec.span for runner in self._runners]
        if profiler is not None:
            timeline.operators = operators_in(profiler.events(), timeline.spans, layers)  # type: ignore[no-untyped-call]
        return Profile(timeline, _summary(timeline, layers, before, after, num_refused))

    def _scheduler(self) -> RecordingScheduler:
        config = self._config
        max_queue_wait_s = config.scheduler.max_queue_wait_s
        limits = SchedulerLimits(
            num_stages=config.num_stages,
            max_num_sequences=config.scheduler.max_num_sequences,
            max_microbatch_tokens=config.scheduler.max_microbatch_tokens,
            max_sequence_tokens=self.max_sequence_tokens,
            max_queue_wait_s=math.inf if max_queue_wait_s is None else max_queue_wait_s,
            schedules_ahead=config.schedules_ahead,
        )
        blocks = KVBlocks(
            self._plan.num_kv_blocks,
            self._plan.resources.block_size,
            reuse_prefixes=config.kv_cache.reuse_prefixes,
        )
        return RecordingScheduler(limits, blocks, self._checkpoint.config.eos_token_ids)

    async def _serve(self, engine: LocalEngine, load: Load, name: str) -> int:
        """Returns the number of requests that were refused since they would have had to wait too long."""
        numbers = count()
        num_refused = 0

        async def serve(planned: PlannedRequest) -> None:
            nonlocal num_refused
            request = planned.request(f"{name} {next(numbers)}", self._num_token_ids)
            try:
                async with aclosing(engine.submit(request)) as events:
                    async for event in events:
                        if not isinstance(event, FailureEvent):
                            continue
                        if event.retry_after_s is None:
                            raise RequestFailedError(f"{request.request_id}: {event.message}")
                        num_refused += 1
            except OverloadedError:
                num_refused += 1

        async def serve_when_due(planned: PlannedRequest) -> None:
            await asyncio.sleep(planned.arrival_s)
            await serve(planned)

        async def serve_one_after_another(requests: Iterator[PlannedRequest]) -> None:
            for planned in requests:
                await serve(planned)

        try:
            async with asyncio.TaskGroup() as clients:
                if load.max_concurrency is None:
                    for planned in load.requests:
                        clients.create_task(serve_when_due(planned))
                else:
                    requests = iter(load.requests)
                    for _ in range(min(load.max_concurrency, len(load.requests))):
                        clients.create_task(serve_one_after_another(requests))
        except* GPTJServeError as errors:
            failures = errors
        else:
            return num_refused
        raise failures.exceptions[0]


def stage_specs(config: PipelineConfig, plan: Plan, num_token_ids: int) -> list[StageSpec]:
    """Options that config and spec call alike are handed on as they are."""
    taken = {"span", "num_kv_blocks", "block_size", "dtype", "device", "num_token_ids"}
    limits = {"max_num_sequences", "max_microbatch_tokens"}
    names = {field.name for field in fields(StageSpec)} - taken - limits
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    return [
        StageSpec(
            span=stage.layers,
            num_kv_blocks=plan.num_kv_blocks,
            block_size=plan.resources.block_size,
            dtype=getattr(torch, plan.resources.dtype),
            device=_device(config, stage.stage_index),
            num_token_ids=num_token_ids,
            max_num_sequences=config.scheduler.max_num_sequences,
            max_microbatch_tokens=config.scheduler.max_microbatch_tokens,
            **options,
        )
        for stage in plan.stages
    ]


def _device(config: PipelineConfig, stage_index: int) -> torch.device:
    """Where Ray would put the stage on a machine with enough GPUs: as many on each as have room for their share."""
    if config.stage.num_gpus == 0:
        return torch.device("cpu")
    index = stage_index // int(1 / config.stage.num_gpus)
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"pipeline.stage.num_gpus={config.stage.num_gpus:g}: {config.num_stages} stages need more GPUs than this "
            f"machine's {torch.cuda.device_count()}"
        )
    return torch.device("cuda", index)


def _summary(
    timeline: Timeline, layers: list[range], before: EngineStats, after: EngineStats, num_refused: int
) -> ProfileSummary:
    num_generated = after.num_tokens_generated - before.num_tokens_generated
    return ProfileSummary(
        num_finished=after.num_requests_finished - before.num_requests_finished,
        num_refused=num_refused,
        num_steps=len({span.microbatch_id for span in timeline.spans}),
        duration_s=timeline.duration_s,
        num_prompt_tokens=after.num_prompt_tokens - before.num_prompt_tokens,
        num_tokens_generated=num_generated,
        num_preemptions=after.num_preemptions - before.num_preemptions,
        tokens_per_s=num_generated / timeline.duration_s if timeline.duration_s else 0.0,
        scheduler_s_per_step=scheduler_s_per_step(timeline),
        stages=[summarize_stage(timeline, index, span) for index, span in enumerate(layers)],
    )
