"""What routing by cached prefixes and by sessions is worth, beside two random choices: `python -m benchmarks.routing`.

Users hold conversations of several turns, each turn with all that was said before as its prompt; conversations begin
with one of a few system prompts. Each way of routing has the same users, with the same seed, on new pipelines.

Scheduler, KV blocks and the choice of the pipeline are the service's own, but computing is waiting: a pipeline takes
for a microbatch as long as the demo model takes on one core, measured at the start, times `--slowdown`. Pipelines that
really computed would share this machine's cores, and so an idle one would make a busy one faster.
"""

import asyncio
import itertools
import random
import time
from collections import Counter
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from gptj_serve.config import ServiceConfig
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.partition import head_cost, partition
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.profiling.percentile import percentile
from gptj_serve.routing.choice import PipelineChoice
from gptj_serve.steps import MicroBatch, Row, RowResult, SampledToken, SampleSpec, StepOutput
from gptj_serve.types import EngineRequest, SamplingParams, Task, Warpers

BLOCK_SIZE = 16
VOCABULARY = 8000
MAX_MICROBATCH_TOKENS = 512
MAX_TOKENS = 1024  # of a sequence
console = Console(width=110)


@dataclass(frozen=True)
class Users:
    """What they do; lengths are in tokens."""

    num_users: int
    num_conversations: int
    num_turns: int
    num_system_prompts: int  # the n-th is chosen 1/n as often as the first
    system_length: int
    message_length: int
    answer_length: int
    think_s: float  # between an answer and the next turn, on average


@dataclass
class Outcome:
    """Of one way of routing."""

    first_token_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    num_requests: Counter[str] = field(default_factory=Counter)  # by pipeline
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class Way:
    name: str
    is_prefix_aware: bool
    has_sessions: bool = False
    num_ingresses: int = 1


WAYS = [
    Way("two random choices", is_prefix_aware=False),
    Way("cached prefixes", is_prefix_aware=True),
    Way("cached prefixes, 3 ingresses", is_prefix_aware=True, num_ingresses=3),
    Way("sessions, 3 ingresses", is_prefix_aware=True, has_sessions=True, num_ingresses=3),
]


def main(
    pipelines: int = 4,
    users: int = 40,
    conversations: int = 100,
    turns: int = 5,
    system_prompts: int = 6,
    system_tokens: int = 256,
    kv_tokens: Annotated[int, typer.Option(help="Of each pipeline's pool.")] = 8192,
    think_s: Annotated[float, typer.Option(help="Between an answer and the next turn, on average.")] = 1.0,
    slowdown: Annotated[float, typer.Option(help="Of the demo model.")] = 5.0,
) -> None:
    demo = measured_speed()
    speed = Speed(slowdown * demo.step_s, slowdown * demo.token_s)
    console.print(
        f"the demo on one core: {1e3 * demo.step_s:.2f} ms for a microbatch and {1e6 * demo.token_s:.1f} µs for each "
        f"token of it; each pipeline here takes {slowdown:g} times as long"
    )
    who = Users(users, conversations, turns, system_prompts, system_tokens, 48, 32, think_s)
    table = Table("routed by", "cached", "first token p50", "p99", "turns/s", "busiest / mean")
    for way in WAYS:
        outcome = asyncio.run(run(way, who, pipelines, speed, kv_tokens // BLOCK_SIZE))
        requests = outcome.num_requests
        table.add_row(
            way.name,
            f"{outcome.num_reused_tokens / outcome.num_prompt_tokens:.0%}",
            f"{1e3 * percentile(outcome.first_token_s, 0.5):.0f} ms",
            f"{1e3 * percentile(outcome.first_token_s, 0.99):.0f} ms",
            f"{requests.total() / outcome.elapsed_s:.1f}",
            f"{max(requests.values()) * pipelines / requests.total():.2f}",
        )
    console.print(table)


@dataclass(frozen=True)
class Speed:
    """Seconds of a microbatch: for itself, and for each of its tokens."""

    step_s: float
    token_s: float


class TimedPipeline:
    """Waits instead of computing, one microbatch after the other. Tokens follow from their positions."""

    def __init__(self, speed: Speed) -> None:
        self._speed = speed
        self._is_computing = asyncio.Lock()

    async def run(self, microbatch: MicroBatch) -> StepOutput:
        async with self._is_computing:
            await asyncio.sleep(self._speed.step_s + self._speed.token_s * microbatch.num_tokens)
        rows = [RowResult([_token(row)]) if row.samples else None for row in microbatch.rows]
        return StepOutput(microbatch.microbatch_id, rows)

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def recover(self) -> None:
        raise AssertionError("nothing is lost here")

    def stage_statuses(self) -> list[dict[str, Any]]:
        return []


def _token(row: Row) -> SampledToken:
    return SampledToken((row.token_ids[-1] * 31 + row.end) % VOCABULARY, -1.0)


class Service:
    """Several pipelines under several ingresses, which the requests come to at random as they do from Serve's proxy."""

    def __init__(self, engines: dict[str, LocalEngine], way: Way, num_kv_blocks: int) -> None:
        self.engines = engines
        self._choices = [
            PipelineChoice(BLOCK_SIZE, num_kv_blocks, is_prefix_aware=way.is_prefix_aware)
            for _ in range(way.num_ingresses)
        ]
        self._random = random.Random(1)  # no secret

    async def ask(self, request: EngineRequest, outcome: Outcome) -> list[int]:
        """The answer's tokens."""
        choice = self._random.choice(self._choices)
        others = {name: self._load(name) - choice.num_requests(name) for name in self.engines}
        pipeline = choice.route(request, self.engines.keys(), others).pipeline
        if pipeline is None:
            pipeline = min(self._random.sample(list(self.engines), 2), key=self._load)
        choice.on_taken(request.request_id, pipeline)
        outcome.num_requests[pipeline] += 1
        answer: list[int] = []
        began_at = time.perf_counter()
        async with aclosing(self.engines[pipeline].submit(request)) as events:
            async for event in events:
                choice.on_event(request.request_id, pipeline)
                if not answer:
                    outcome.first_token_s.append(time.perf_counter() - began_at)
                answer.append(event.token_id)  # type: ignore[union-attr]  # it generates, and nothing fails
        choice.ended(request.request_id, answer)
        return answer

    def _load(self, pipeline: str) -> int:
        stats = self.engines[pipeline].stats()
        return stats.num_running + stats.num_waiting


async def converse(service: Service, users: Users, way: Way) -> Outcome:
    outcome = Outcome()
    conversations = itertools.count()
    lot = random.Random(2)
    systems = [lot.choices(range(VOCABULARY), k=users.system_length) for _ in range(users.num_system_prompts)]
    weights = [1 / (1 + index) for index in range(len(systems))]

    async def user() -> None:
        while (number := next(conversations)) < users.num_conversations:
            lot = random.Random(1000 + number)
            (said,) = lot.choices(systems, weights)
            for turn in range(users.num_turns):
                await asyncio.sleep(lot.expovariate(1 / users.think_s))
                length = lot.randint(users.message_length // 2, users.message_length * 3 // 2)
                said = [*said, *lot.choices(range(VOCABULARY), k=length)]
                request = EngineRequest(
                    request_id=f"{number}-{turn}",
                    task=Task.GENERATE,
                    prompt_token_ids=said,
                    sampling=SamplingParams(max_new_tokens=users.answer_length, ignore_eos=True),
                    session_id=f"conversation {number}" if way.has_sessions else "",
                )
                said = [*said, *await service.ask(request, outcome)]

    began_at = time.perf_counter()
    await asyncio.gather(*[user() for _ in range(users.num_users)])
    outcome.elapsed_s = time.perf_counter() - began_at
    for engine in service.engines.values():
        stats = engine.stats()
        outcome.num_prompt_tokens += stats.num_prompt_tokens
        outcome.num_reused_tokens += stats.num_prefix_tokens_reused
    return outcome


async def run(way: Way, users: Users, num_pipelines: int, speed: Speed, num_kv_blocks: int) -> Outcome:
    limits = SchedulerLimits(1, 256, MAX_MICROBATCH_TOKENS, MAX_TOKENS)
    async with AsyncExitStack() as stack:
        engines = {}
        for index in range(num_pipelines):
            scheduler = Scheduler(limits, KVBlocks(num_kv_blocks, BLOCK_SIZE), frozenset())
            engines[f"pipeline {index}"] = await stack.enter_async_context(LocalEngine(scheduler, TimedPipeline(speed)))
        return await converse(Service(engines, way, num_kv_blocks), users, way)


def measured_speed() -> Speed:
    """Of the demo on one core: a microbatch of one token, and one that is full of prompts."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(ServiceConfig().checkpoint_dir)
    (span,) = partition(checkpoint.config.n_layer, 1, head_cost(checkpoint.config))
    num_blocks = MAX_MICROBATCH_TOKENS // BLOCK_SIZE
    device, vocabulary = torch.device("cpu"), checkpoint.config.vocab_size
    runner = StageRunner.load(checkpoint, StageSpec(span, num_blocks, BLOCK_SIZE, torch.float32, device, vocabulary))
    ids = itertools.count()

    def seconds(num_tokens: int) -> float:
        row = Row([1] * num_tokens, 0, list(range(num_blocks)), samples=[SampleSpec(Warpers())])
        times = []
        for _ in range(30):
            began_at = time.perf_counter()
            runner.run(MicroBatch(next(ids), [row]), None)
            times.append(time.perf_counter() - began_at)
        return min(times)  # others may use the core too

    one, full = seconds(1), seconds(MAX_MICROBATCH_TOKENS)
    token_s = (full - one) / (MAX_MICROBATCH_TOKENS - 1)
    return Speed(one - token_s, token_s)


if __name__ == "__main__":
    typer.run(main)
