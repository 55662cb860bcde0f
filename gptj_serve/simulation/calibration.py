"""Measures a checkpoint's stages, and an engine over them, in this process: what `gptj-serve bench` does."""

import asyncio
import math
import platform
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import count, cycle, islice

import numpy as np
import torch

from gptj_serve.config import ServiceConfig
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.errors import ConfigError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.partition import head_cost
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.pipeline.threads import threads_per_stage
from gptj_serve.planner import Plan, plan_service
from gptj_serve.profiling.load import PlannedRequest
from gptj_serve.profiling.session import stage_specs
from gptj_serve.simulation.cost_model import CostModel, ModelShape
from gptj_serve.simulation.fit import Asked, Round, StageTime, fit_engine, fit_stages, stage_errors
from gptj_serve.simulation.step_shape import shape_of
from gptj_serve.steps import MicroBatch, Row, SampleSpec
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import TokenEvent


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of what is measured, as far as it fits the model and its KV pool."""

    rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128)  # that decode
    contexts: Sequence[int] = (16, 128, 512, 1536)  # of these
    chunks: Sequence[int] = (16, 64, 256, 512)  # of a prompt
    repeats: int = 9
    rounds: Sequence[tuple[int, int, int]] = (  # requests at a time; prompt and new tokens of each, on average
        *((1, 64, 48), (2, 64, 48), (4, 64, 48), (8, 64, 48), (16, 64, 48), (64, 64, 48)),
        *((1, 320, 16), (2, 320, 16), (4, 320, 16), (16, 320, 16)),  # the stages' work weighs more, the engine's less
    )
    num_rounds: int = 5

    def asked(self, max_tokens: int) -> list[Asked]:
        """Requests of several lengths, so that prompts come while others decode, as they do in service."""
        found = []
        for max_concurrency, num_prompt, num_new in self.rounds:
            num_requests = max(len(_LENGTHS), 2 * max_concurrency)
            factors = list(islice(cycle(_LENGTHS), num_requests))
            news = [max(1, round(factor * num_new)) for factor in factors]
            prompts = [
                max(1, min(round(factor * num_prompt), max_tokens - new))
                for factor, new in zip(factors, news, strict=True)
            ]
            found.append(Asked(max_concurrency, list(zip(prompts, news, strict=True))))
        return found


_LENGTHS = (0.25, 1.75, 0.5, 1.5, 1.0)

FULL = Sizes()


def calibrate(config: ServiceConfig, sizes: Sizes = FULL) -> CostModel:
    """Raises `ConfigError` or `CheckpointError` for what can't be served like that."""
    checkpoint = Checkpoint.open(config.checkpoint_dir)
    if "lm_head" not in checkpoint.heads:
        raise ConfigError(f"checkpoint={config.checkpoint!r}: has no lm_head, and what is measured is generation")
    num_token_ids = min(Tokenizer.from_directory(config.checkpoint_dir).num_token_ids, checkpoint.config.vocab_size)
    pipeline = config.pipeline
    plan = plan_service(pipeline, checkpoint)
    torch.set_num_threads(threads_per_stage(pipeline.num_stages, pipeline.stage.num_threads))
    runners = [StageRunner.load(checkpoint, spec) for spec in stage_specs(pipeline, plan, num_token_ids)]
    shapes = microbatch_shapes(checkpoint.config.n_positions, sizes)
    times = [time for runner in runners for time in stage_times(runner, shapes, sizes.repeats)]
    num_left_out = len(runners) * len(shapes) - len(times)
    if pipeline.num_stages > 1:  # other numbers of layers tell what a layer costs
        alone = pipeline.model_copy(update={"num_stages": 1})
        (spec,) = stage_specs(alone, plan_service(alone, checkpoint), num_token_ids)
        more = list(stage_times(StageRunner.load(checkpoint, spec), shapes, sizes.repeats))
        num_left_out += len(shapes) - len(more)
        times += more
    shape = ModelShape(
        name=config.served_name,
        num_layers=checkpoint.config.n_layer,
        max_sequence_tokens=checkpoint.config.n_positions,
        head_layers=head_cost(checkpoint.config),
    )
    cost = fit_stages(CostModel(source="measured", model=shape), times)
    errors = np.abs(stage_errors(cost, times))
    limits = _limits(config, checkpoint)
    rounds = asyncio.run(_rounds(runners, limits, plan, num_token_ids, sizes))
    measured_alone = cost
    cost = fit_engine(cost, limits, plan.num_kv_blocks, plan.resources.block_size, rounds)
    notes: dict[str, str | int | float] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads_per_stage": torch.get_num_threads(),
        "dtype": plan.resources.dtype,
        "num_stages": pipeline.num_stages,
        "stage_times": len(times),
        "stage_times_left_out": num_left_out,
        "max_context_tokens": max(time.shape.num_context_tokens for time in times),
        "stage_error_mean": float(errors.mean()),
        "stage_error_p90": float(np.percentile(errors, 90)),
        "stage_factor": cost.token_s / measured_alone.token_s if measured_alone.token_s else 1.0,
    }
    for measured in rounds:
        prompts, news = zip(*measured.asked.lengths, strict=True)
        means = f"{statistics.mean(prompts):.0f}+{statistics.mean(news):.0f}"
        notes[f"tokens_per_s_of_{measured.asked.max_concurrency}x{means}"] = measured.tokens_per_s
    return cost.model_copy(update={"notes": notes})


def _limits(config: ServiceConfig, checkpoint: Checkpoint) -> SchedulerLimits:
    scheduler = config.pipeline.scheduler
    return SchedulerLimits(
        config.pipeline.num_stages,
        scheduler.max_num_sequences,
        scheduler.max_microbatch_tokens,
        checkpoint.config.n_positions,
    )


# ------------------------------------------------------------------------------------------------ stages


Spans = list[tuple[int, int]]
"""Of each row of a microbatch: how many tokens its sequence has, and how many more are computed."""


def microbatch_shapes(max_tokens: int, sizes: Sizes) -> list[Spans]:
    """A grid: rows that decode over contexts, chunks of prompts, and both."""
    decode = [[(context, 1)] * rows for rows in sizes.rows for context in sizes.contexts if context < max_tokens]
    chunks = [[(start, size)] for size in sizes.chunks for start in (0, max_tokens // 2) if start + size <= max_tokens]
    mixed = [[(128, 1)] * 16 + [(0, size)] for size in sizes.chunks if max(128, size) < max_tokens]
    return decode + chunks + mixed


def stage_times(runner: StageRunner, shapes: Iterable[Spans], repeats: int) -> Iterator[StageTime]:
    """Of each shape that the KV pool has room for.

    Each is the fastest of several: whatever else a machine does only adds.
    """
    stage = runner.stage
    microbatch_id = 0
    for spans in shapes:
        rows = _rows(spans, runner.spec)
        if rows is None:
            continue
        shape = shape_of(rows)
        hidden = None if stage.is_first else torch.randn(shape.num_tokens, stage.config.n_embd, dtype=runner.spec.dtype)
        seconds = []
        for _ in range(1 + repeats):  # the first to warm up
            began_at = time.perf_counter()
            runner.run(MicroBatch(microbatch_id, rows), hidden)
            runner.synchronize()
            seconds.append(time.perf_counter() - began_at)
            microbatch_id += 1
        yield StageTime(shape, len(runner.spec.span), stage.is_last, min(seconds[1:]))
    runner.restart()


def _rows(spans: Spans, spec: StageSpec) -> list[Row] | None:
    """Each with KV blocks of its own; None if there are too few."""
    needed = [-(-(start + size) // spec.block_size) for start, size in spans]
    if sum(needed) > spec.num_kv_blocks:
        return None
    ends = np.cumsum(needed).tolist()
    return [
        Row([1 + index % 100] * size, start, list(range(end - count, end)), samples=[SampleSpec()])
        for index, ((start, size), count, end) in enumerate(zip(spans, needed, ends, strict=True))
    ]


# ------------------------------------------------------------------------------------------------ an engine


async def _rounds(
    runners: Sequence[StageRunner], limits: SchedulerLimits, plan: Plan, num_token_ids: int, sizes: Sizes
) -> list[Round]:
    """Each the middle one of several: what a service would see, not what it could reach."""
    blocks = KVBlocks(plan.num_kv_blocks, plan.resources.block_size)
    pipeline = InProcessPipeline(runners)
    limits = replace(limits, max_queue_wait_s=math.inf)
    try:
        async with LocalEngine(Scheduler(limits, blocks, frozenset()), pipeline) as engine:
            numbers = count()

            async def stream(num_prompt_tokens: int, num_new_tokens: int) -> AsyncGenerator[int]:
                planned = PlannedRequest(0.0, num_prompt_tokens, num_new_tokens)
                async with aclosing(engine.submit(planned.request(str(next(numbers)), num_token_ids))) as events:
                    async for event in events:
                        assert isinstance(event, TokenEvent), event
                        yield 1

            return [
                await median_round(asked, stream, sizes.num_rounds) for asked in sizes.asked(limits.max_sequence_tokens)
            ]
    finally:
        pipeline.close()


Stream = Callable[[int, int], AsyncGenerator[int]]
"""Of a prompt of so many tokens and so many new ones: how many have come, each time that some do."""


async def median_round(asked: Asked, stream: Stream, num_rounds: int) -> Round:
    """By its tokens per second."""
    found = [await _round(asked, stream) for _ in range(num_rounds)]
    return sorted(found, key=lambda one: one.tokens_per_s)[num_rounds // 2]


async def _round(asked: Asked, stream: Stream) -> Round:
    waiting = iter(asked.lengths)
    firsts_s: list[float] = []

    async def one_after_another() -> None:
        for num_prompt_tokens, num_new_tokens in waiting:
            began_at = time.perf_counter()
            first_s = None
            async with aclosing(stream(num_prompt_tokens, num_new_tokens)) as counts:
                async for _ in counts:
                    first_s = first_s or time.perf_counter() - began_at
            assert first_s is not None
            firsts_s.append(first_s)

    began_at = time.perf_counter()
    await asyncio.gather(*(one_after_another() for _ in range(asked.max_concurrency)))
    tokens_per_s = asked.num_new_tokens / (time.perf_counter() - began_at)
    return Round(asked, tokens_per_s, statistics.median(firsts_s))
