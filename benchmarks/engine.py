"""What the engine's parts bring and cost, in ratios of one run: `python -m benchmarks.engine [--trace CSV]`.

Everything runs on this machine, on the demo checkpoint where a model is needed: prefix reuse on repeated contexts,
prompt-lookup drafts on extractive prompts, steps made ahead, idle stages by scheduling policy over a trace's lengths,
and the time that scheduler and sampler take per step.
"""

# ruff: noqa: E402  # the environment must be set before torch is loaded
from gptj_serve.environment import keep_openmp_from_spinning

keep_openmp_from_spinning()  # as in the service

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.stage_processes import StageProcessConfig, linked_stages
from gptj_serve.config import ServiceConfig
from gptj_serve.engine.engine import Pipeline
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.sampling import sample
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.profiling.load import trace_requests
from gptj_serve.simulation.schedule import simulate_schedule
from gptj_serve.simulation.steps_source import any_answer
from gptj_serve.steps import MicroBatch, SampleSpec
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import EngineRequest, SamplingParams, Task, TokenEvent, Warpers

BLOCK_SIZE = 16
CONTEXT_LIMIT = 2048
ROUNDS_AHEAD = 8
console = Console(width=110)

PASSAGE = (
    "The harbour of the old town was built in 1842 by Captain John Harding, who had bought the land from the widow of "
    "a fisherman. The lighthouse at the end of the pier was added in 1851, after two ships were lost in one night. "
    "Captain John Harding gave the lighthouse to the town, and the town gave the street along the harbour his name. "
    "In the winter of 1860 the pier was broken by the ice, and for two years no ship could enter the harbour. "
)


def main(
    trace: Annotated[Path | None, typer.Option(help="CSV of arrival, prompt tokens, output tokens.")] = None,
    num_trace_requests: int = 400,
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    console.print(f"torch {torch.__version__}, {threads} threads")
    checkpoint = Checkpoint.open(ServiceConfig().checkpoint_dir)
    tokenizer = Tokenizer.from_directory(ServiceConfig().checkpoint_dir)
    asyncio.run(measure_prefix_reuse(checkpoint, tokenizer))
    asyncio.run(measure_drafts(checkpoint, tokenizer))
    asyncio.run(measure_ahead(checkpoint, tokenizer, threads))
    measure_bubbles(trace_lengths(trace) if trace else drawn_lengths(), num_trace_requests)
    measure_overhead()


# ------------------------------------------------------------------------------------------------ on the demo model


async def measure_prefix_reuse(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Sixteen questions about one context of about 700 tokens, each answered with 8 tokens, one after another."""
    context = tokenizer.encode(PASSAGE * 7)[:700]
    prompts = [[*context, *tokenizer.encode(f" Question {i}: when was that?")] for i in range(16)]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(3):
        for reuse in (False, True):
            scheduler, pipeline = make_engine(checkpoint, reuse_prefixes=reuse)
            async with LocalEngine(scheduler, pipeline) as engine:
                began = time.perf_counter()
                for prompt in prompts:
                    await generate(engine, prompt, SamplingParams(max_new_tokens=8, ignore_eos=True))
                seconds[reuse].append(time.perf_counter() - began)
            pipeline.close()
    without, with_reuse = statistics.median(seconds[False]), statistics.median(seconds[True])
    hit_rate = scheduler.num_prefix_tokens_reused / scheduler.num_prefix_tokens
    table = Table("prefix reuse", "seconds", "speed-up", "hit rate", title="16 questions on one context, 8 tokens each")
    table.add_row("off", f"{without:.2f}", "1.0", "")
    table.add_row("on", f"{with_reuse:.2f}", f"{without / with_reuse:.1f}", f"{hit_rate:.1%}")
    console.print(table)


async def measure_drafts(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Prompts whose continuation is likely to repeat them, greedy and sampled at a low temperature."""
    chance = random.Random(0)
    sentences = PASSAGE.split(". ")
    prompts = [
        tokenizer.encode(PASSAGE + ". ".join(chance.sample(sentences[:-1], 2)) + ". " + PASSAGE[:60]) for _ in range(8)
    ]
    table = Table("prompt lookup", "temperature", "accepted", "tokens/step", "seconds", "speed-up", title="Drafts of 5")
    for temperature in (0.0, 0.7):
        base = 0.0
        for num_drafted in (0, 5):
            params = SamplingParams(
                max_new_tokens=64,
                ignore_eos=True,
                warpers=Warpers(temperature=temperature),
                seed=1,
                prompt_lookup_num_tokens=num_drafted,
            )
            scheduler, pipeline = make_engine(checkpoint)
            async with LocalEngine(scheduler, pipeline) as engine:
                began = time.perf_counter()
                for prompt in prompts:
                    await generate(engine, prompt, params)
                seconds = time.perf_counter() - began
            pipeline.close()
            accepted = scheduler.num_draft_tokens_accepted
            base = base or seconds
            share = f"{accepted / scheduler.num_tokens_drafted:.1%}" if num_drafted else ""
            num_tokens = len(prompts) * params.max_new_tokens
            table.add_row(
                str(num_drafted),
                str(temperature),
                share,
                f"{num_tokens / (num_tokens - accepted):.2f}",
                f"{seconds:.2f}",
                f"{base / seconds:.2f}",
            )
    console.print(table)


async def measure_ahead(checkpoint: Checkpoint, tokenizer: Tokenizer, threads: int) -> None:
    """Requests of 96 tokens, so many at a time, on one stage, in turn with and without steps made ahead: the stage a
    thread of this process, and a process of its own as in the service."""
    params = SamplingParams(max_new_tokens=96, ignore_eos=True)
    table = Table("the stage is", "requests at a time", "tokens/s without", "with", "rows made ahead", "ratio")
    table.title = f"Scheduled ahead, a stage of {threads} threads"
    for place, make_pipelines in (("a thread", threads_of), ("a process", processes_of)):
        async with make_pipelines(checkpoint, threads) as pipelines:
            schedulers = {ahead: make_scheduler(checkpoint, schedules_ahead=ahead) for ahead in pipelines}
            for num_requests in (1, 8, 32):
                prompts = [tokenizer.encode(PASSAGE[: 120 + i]) for i in range(num_requests)]
                seconds: dict[bool, list[float]] = {False: [], True: []}
                num_ahead = schedulers[True].num_rows_ahead
                for _ in range(ROUNDS_AHEAD):
                    for ahead, pipeline in pipelines.items():
                        async with LocalEngine(schedulers[ahead], pipeline) as engine:
                            began = time.perf_counter()
                            answers = (generate(engine, prompt, params, f"{i}") for i, prompt in enumerate(prompts))
                            await asyncio.gather(*answers)
                            seconds[ahead].append(time.perf_counter() - began)
                num_tokens = num_requests * params.max_new_tokens
                share = (schedulers[True].num_rows_ahead - num_ahead) / (num_tokens * ROUNDS_AHEAD)
                rates = {ahead: num_tokens / statistics.median(seconds[ahead][1:]) for ahead in (False, True)}
                ratio = f"{rates[True] / rates[False]:.2f}"
                table.add_row(
                    place, str(num_requests), f"{rates[False]:,.0f}", f"{rates[True]:,.0f}", f"{share:.1%}", ratio
                )
    console.print(table)


@asynccontextmanager
async def threads_of(checkpoint: Checkpoint, threads: int) -> AsyncIterator[dict[bool, Pipeline]]:
    """A pipeline for each way to schedule."""
    assert torch.get_num_threads() == threads
    pipelines = {ahead: make_pipeline(checkpoint) for ahead in (False, True)}
    yield {**pipelines}
    for pipeline in pipelines.values():
        pipeline.close()


@asynccontextmanager
async def processes_of(checkpoint: Checkpoint, threads: int) -> AsyncIterator[dict[bool, Pipeline]]:
    config = StageProcessConfig(checkpoint.directory, num_blocks_of(checkpoint), BLOCK_SIZE, torch.float32, threads)
    spans = [range(checkpoint.config.n_layer)]
    async with linked_stages(spans, config) as without, linked_stages(spans, config) as with_it:
        yield {False: without, True: with_it}


def make_engine(checkpoint: Checkpoint, *, reuse_prefixes: bool = True) -> tuple[Scheduler, InProcessPipeline]:
    return make_scheduler(checkpoint, reuse_prefixes=reuse_prefixes), make_pipeline(checkpoint)


def make_scheduler(checkpoint: Checkpoint, *, reuse_prefixes: bool = True, schedules_ahead: bool = False) -> Scheduler:
    limits = SchedulerLimits(1, 64, 512, checkpoint.config.n_positions, schedules_ahead=schedules_ahead)
    blocks = KVBlocks(num_blocks_of(checkpoint), BLOCK_SIZE, reuse_prefixes=reuse_prefixes)
    return Scheduler(limits, blocks, checkpoint.config.eos_token_ids)


def make_pipeline(checkpoint: Checkpoint) -> InProcessPipeline:
    config, num_blocks = checkpoint.config, num_blocks_of(checkpoint)
    spec = StageSpec(
        range(config.n_layer), num_blocks, BLOCK_SIZE, torch.float32, torch.device("cpu"), config.vocab_size
    )
    return InProcessPipeline([StageRunner.load(checkpoint, spec)])


def num_blocks_of(checkpoint: Checkpoint) -> int:
    return 8 * checkpoint.config.n_positions // BLOCK_SIZE


async def generate(engine: LocalEngine, prompt: list[int], params: SamplingParams, request_id: str = "r") -> list[int]:
    request = EngineRequest(request_id=request_id, task=Task.GENERATE, prompt_token_ids=prompt, sampling=params)
    return [event.token_id async for event in engine.submit(request) if isinstance(event, TokenEvent)]


# ------------------------------------------------------------------------------------------------ simulated stages


def trace_lengths(trace: Path) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of the requests that fit a context."""
    return [
        (planned.num_prompt_tokens, planned.num_new_tokens) for planned in trace_requests(trace, None, CONTEXT_LIMIT)
    ]


def drawn_lengths() -> list[tuple[int, int]]:
    chance = random.Random(0)
    return [(int(chance.lognormvariate(6, 1)) % 1500 + 1, chance.randint(10, 400)) for _ in range(5000)]


SCHEDULES = (
    ("one stage: all rows that decode, prompts whole", 1),
    ("four: at most ceil(decoding / 4), prompts cut", 4),
)


def measure_bubbles(lengths: Sequence[tuple[int, int]], num_requests: int) -> None:
    """All requests at once over four equal stages; a step costs a stage 1 ms and 10 µs per token."""
    table = Table("sequences at a time", "scheduled for", "bubble ratio", "tokens/s")
    table.title = f"Four stages, the lengths of {num_requests} requests"
    for max_num_sequences in (16, 256):
        for name, num_stages in SCHEDULES:
            limits = SchedulerLimits(num_stages, max_num_sequences, 512, CONTEXT_LIMIT)
            scheduler = Scheduler(limits, KVBlocks(40 * CONTEXT_LIMIT // BLOCK_SIZE, BLOCK_SIZE), frozenset())
            requests = [fixed_request(str(i), *pair) for i, pair in enumerate(lengths[:num_requests])]
            timeline = simulate_schedule(
                scheduler,
                [(0.0, request) for request in requests],
                lambda shape, stage_index: 1e-3 + 1e-5 * shape.num_tokens,
                num_stages=4,
            )
            num_tokens = sum(output for _, output in lengths[:num_requests])
            rate = f"{num_tokens / timeline.duration_s:.0f}"
            table.add_row(str(max_num_sequences), name, f"{timeline.bubble_ratio:.3f}", rate)
    console.print(table)


def fixed_request(request_id: str, num_prompt: int, num_new: int) -> EngineRequest:
    """Prompts of different requests have nothing in common."""
    prompt = [int(request_id) % 50_000, *[1] * (num_prompt - 1)]
    params = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
    return EngineRequest(request_id=request_id, task=Task.GENERATE, prompt_token_ids=prompt, sampling=params)


# ------------------------------------------------------------------------------------------------ overhead per step


def measure_overhead() -> None:
    """One step of sequences of 512 tokens that all decode; the sampler over logits as peaked as a language model's."""
    for vocab_size in (4_096, 50_400):
        table = Table("running", "scheduler", "greedy", "temperature", "top-p", "bare argmax", "bare logsumexp")
        table.title = f"µs per step of scheduler and sampler, {vocab_size:,} logits a row"
        for num_running in (1, 32, 256):
            table.add_row(str(num_running), *overhead(num_running, vocab_size))
        console.print(table)


def overhead(num_running: int, vocab_size: int) -> list[str]:
    limits = SchedulerLimits(1, 256, 512, CONTEXT_LIMIT)
    scheduler = Scheduler(limits, KVBlocks(256 * 64, BLOCK_SIZE), frozenset())
    for index in range(num_running):
        scheduler.add(fixed_request(str(index), 512, 1024))
    microbatch = step(scheduler)
    while len(microbatch.rows) < num_running or any(len(row.token_ids) > 1 for row in microbatch.rows):
        microbatch = step(scheduler)
    logits = 3 * torch.randn(num_running, vocab_size)
    positions = [512] * num_running

    def sampler(warpers: Warpers) -> str:
        return micros(lambda: sample(logits, [SampleSpec(warpers, seed) for seed in range(num_running)], positions))

    return [
        micros(lambda: step(scheduler)),
        sampler(Warpers()),
        sampler(Warpers(temperature=0.8)),
        sampler(Warpers(temperature=0.8, top_p=0.9)),
        micros(lambda: logits.argmax(dim=-1)),
        micros(lambda: logits.logsumexp(dim=-1)),
    ]


def step(scheduler: Scheduler) -> MicroBatch:
    microbatch = scheduler.schedule()
    assert microbatch is not None
    scheduler.update(any_answer(microbatch))
    return microbatch


def micros(work: Callable[[], object], repeats: int = 15) -> str:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return f"{statistics.median(times) * 1e6:,.0f}"


if __name__ == "__main__":
    typer.run(main)
