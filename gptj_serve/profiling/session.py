"""A profile of one engine in this process, with the stages, limits and threads of a deployment's config."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
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
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.pipeline.threads import threads_per_stage
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
    """The engine of a config. Raises `ConfigError` or `CheckpointError` for what can't be served like that.

    Its weights are loaded for the first profile. Only generation is profiled: task heads are left out.
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
        self._specs = stage_specs(pipeline, self._plan, self._num_token_ids)

    @property
    def max_sequence_tokens(self) -> int:
        return self._checkpoint.config.n_positions

    @property
    def dtype(self) -> str:
        return self._plan.resources.dtype

    async def profile(self, load: Load, *, with_operators: bool = False) -> Profile:
        """Serve the load and end. Raises `InvalidRequestError` if a request can't be served, before it loads."""
        self._check(load)
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
                    served = await self._serve(engine, load, "request")
                after = engine.stats()
        finally:
            pipeline.close()
        timeline = scheduler.timeline(meters)
        layers = [spec.span for spec in self._specs]
        if profiler is not None:
            timeline.operators = operators_in(profiler.events(), timeline.spans, layers)  # type: ignore[no-untyped-call]
        return Profile(timeline, self._summary(timeline, before, after, served))

    @cached_property
    def _runners(self) -> list[StageRunner]:
        torch.set_num_threads(threads_per_stage(self._config.num_stages, self._config.stage.num_threads))
        return [ProfiledRunner.load(self._checkpoint, spec) for spec in self._specs]

    def _check(self, load: Load) -> None:
        scheduler = self._scheduler()
        for planned in {replace(planned, arrival_s=0.0) for planned in load.requests}:
            scheduler.add(planned.request("asked before", self._num_token_ids))
            scheduler.abort("asked before")

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

    async def _serve(self, engine: LocalEngine, load: Load, name: str) -> "_Served":
        numbers = count()
        served = _Served()

        async def serve(planned: PlannedRequest) -> None:
            request = planned.request(f"{name} {next(numbers)}", self._num_token_ids)
            try:
                async with aclosing(engine.submit(request)) as events:
                    async for event in events:
                        if not isinstance(event, FailureEvent):
                            continue
                        if event.retry_after_s is None:
                            raise RequestFailedError(f"{request.request_id}: {event.message}")
                        raise OverloadedError(event.message, event.retry_after_s)
            except OverloadedError:
                served.num_refused += 1
            else:
                served.num_prompt_tokens += planned.num_prompt_tokens

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
            return served
        raise failures.exceptions[0]

    def _summary(
        self, timeline: Timeline, before: EngineStats, after: EngineStats, served: "_Served"
    ) -> ProfileSummary:
        num_generated = after.num_tokens_generated - before.num_tokens_generated
        return ProfileSummary(
            dtype=self.dtype,
            kernels=", ".join(dict.fromkeys(runner.kernels for runner in self._runners)),
            threads_per_stage=torch.get_num_threads(),
            num_finished=after.num_requests_finished - before.num_requests_finished,
            num_refused=served.num_refused,
            num_steps=len({span.microbatch_id for span in timeline.spans}),
            duration_s=timeline.duration_s,
            num_prompt_tokens=served.num_prompt_tokens,
            num_tokens_generated=num_generated,
            num_preemptions=after.num_preemptions - before.num_preemptions,
            tokens_per_s=num_generated / timeline.duration_s if timeline.duration_s else 0.0,
            scheduler_s_per_step=scheduler_s_per_step(timeline),
            stages=[summarize_stage(timeline, index, spec.span) for index, spec in enumerate(self._specs)],
        )


@dataclass(slots=True)
class _Served:
    """Of a load: prompts of requests that came to their end, and how many would have had to wait too long."""

    num_prompt_tokens: int = 0
    num_refused: int = 0


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
