"""Measures a checkpoint's stages, and an engine over them, in this process: what `gptj-serve bench` does."""

import asyncio
import platform
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

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
from gptj_serve.simulation.fit import Round, StageTime, fit_engine, fit_stages, stage_errors
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
    rounds: Sequence[int] = (1, 4, 16, 64)  # equal requests at a time
    num_prompt_tokens: int = 64  # of these
    num_new_tokens: int = 48
    num_rounds: int = 4


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
    }
    for measured in rounds:
        notes[f"tokens_per_s_of_{measured.num_requests}"] = measured.tokens_per_s
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
    """Each the fastest of several."""
    blocks = KVBlocks(plan.num_kv_blocks, plan.resources.block_size)
    pipeline = InProcessPipeline(runners)
    limits = replace(limits, max_queue_wait_s=float("inf"))
    try:
        async with LocalEngine(Scheduler(limits, blocks, frozenset()), pipeline) as engine:
            rounds = []
            for size in sizes.rounds:
                found = [await _round(engine, size, number, num_token_ids, sizes) for number in range(sizes.num_rounds)]
                rounds.append(max(found, key=lambda one: one.tokens_per_s))
            return rounds
    finally:
        pipeline.close()


async def _round(engine: LocalEngine, size: int, number: int, num_token_ids: int, sizes: Sizes) -> Round:
    planned = PlannedRequest(0.0, sizes.num_prompt_tokens, sizes.num_new_tokens)
    requests = [planned.request(f"{size} {number} {index}", num_token_ids) for index in range(size)]
    began_at = time.perf_counter()

    async def first_token_s(index: int) -> float:
        first_s = None
        async with aclosing(engine.submit(requests[index])) as events:
            async for event in events:
                assert isinstance(event, TokenEvent)
                first_s = first_s or time.perf_counter() - began_at
        assert first_s is not None
        return first_s

    firsts_s = await asyncio.gather(*map(first_token_s, range(size)))
    tokens_per_s = size * sizes.num_new_tokens / (time.perf_counter() - began_at)
    return Round(size, sizes.num_prompt_tokens, sizes.num_new_tokens, tokens_per_s, statistics.median(firsts_s))
