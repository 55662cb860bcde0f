"""Our pipeline over 1, 2 and 4 stages: threads in one process, and processes linked as in the service.

The threads are divided between the stages. All pipelines stay loaded and take turns.
"""

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from benchmarks.speed.contestants import CONTESTANTS, PROCESS_BYTES, ContestantProcess, Settings, held_bytes
from benchmarks.speed.engines import NO_LIMIT_S, Log, usable_memory_bytes
from benchmarks.speed.load import batch_requests
from benchmarks.speed.ours_contestant import BLOCK_SIZE, new_scheduler, serve
from benchmarks.speed.results import Results, Row, spread
from benchmarks.speed.streams import Request, Stream, batch_figures
from benchmarks.stage_processes import LinkedStages, StageProcessConfig, linked_stages
from gptj_serve.engine.local import LocalEngine
from gptj_serve.pipeline.partition import head_cost, partition

NUM_PROMPT_TOKENS = 16
NAME = "ours-fp32"


@dataclass(frozen=True, slots=True)
class PipelineSizes:
    num_stages: Sequence[int]
    num_concurrent: int = 32
    num_new_tokens: int = 80  # more than the steps that a stage's meter shows: all of those are of one run then

    @property
    def num_kv_tokens(self) -> int:
        return self.num_concurrent * (NUM_PROMPT_TOKENS + self.num_new_tokens)


class _Pipeline(Protocol):
    async def generate(self, requests: Sequence[Request]) -> list[Stream]: ...

    async def stages(self) -> list[dict[str, Any]]:
        """As `StepMeter.status`."""


class _InProcess:
    def __init__(self, process: ContestantProcess) -> None:
        self._process = process

    async def generate(self, requests: Sequence[Request]) -> list[Stream]:
        return self._process.generate(requests, len(requests), NO_LIMIT_S)

    async def stages(self) -> list[dict[str, Any]]:
        return self._process.stages()


class _Linked:
    def __init__(self, engine: LocalEngine, stages: LinkedStages) -> None:
        self._engine = engine
        self._stages = stages

    async def generate(self, requests: Sequence[Request]) -> list[Stream]:
        return await serve(self._engine, requests, NO_LIMIT_S)

    async def stages(self) -> list[dict[str, Any]]:
        return await self._stages.ask("status")


async def measure_pipelines(settings: Settings, sizes: PipelineSizes, rounds: int, results: Results, log: Log) -> None:
    """Rows of the group "pipeline", in fp32."""
    num_more = sum(num_stages - 1 for num_stages in sizes.num_stages)  # processes of linked stages
    needed = 2 * len(sizes.num_stages) * held_bytes(CONTESTANTS[NAME], settings) + num_more * PROCESS_BYTES
    if needed > usable_memory_bytes():
        results.left_out["pipeline"] = f"all of them together need about {needed / 2**30:.0f} GiB"
        return
    figures: dict[tuple[str, int], list[Row]] = {}
    async with contextlib.AsyncExitStack() as stack:
        pipelines: dict[tuple[str, int], _Pipeline] = {}
        for num_stages in sizes.num_stages:
            log(f"loading pipelines of {num_stages} stages")
            own = replace(settings, num_stages=num_stages)
            pipelines["in process", num_stages] = stack.enter_context(_in_process(own))
            pipelines["linked", num_stages] = await stack.enter_async_context(_linked(own, sizes))
        for index in range(-1, rounds):
            log("pipelines: " + ("warm-up" if index < 0 else f"round {index + 1} of {rounds}"))
            for name, pipeline in pipelines.items():
                row = await _measure(pipeline, settings, sizes, index)
                if index >= 0:
                    figures.setdefault(name, []).append(row)
    rows: list[Row] = []
    for (kind, num_stages), measured in sorted(figures.items()):
        row = {"kind": kind, "num_stages": num_stages, "threads": max(1, settings.threads // num_stages)}
        rows.append(row | {field: spread(one[field] for one in measured) for field in measured[0]})
    for row in rows:
        whole = next(other for other in rows if other["kind"] == row["kind"])
        row["to_one_stage"] = row["concurrent_rate"].median / whole["concurrent_rate"].median
    results.groups["pipeline"] = rows


async def _measure(pipeline: _Pipeline, settings: Settings, sizes: PipelineSizes, seed: int) -> Row:
    """A round: one sequence alone, for the handoff of a decode step; then many, for rate and bubbles."""

    def requests(batch: int) -> list[Request]:
        return batch_requests(settings.config, batch, NUM_PROMPT_TOKENS, sizes.num_new_tokens, seed)

    alone = batch_figures(await pipeline.generate(requests(1)))
    handoffs = [stage["handoff_s"] for stage in (await pipeline.stages())[1:]]
    together = batch_figures(await pipeline.generate(requests(sizes.num_concurrent)))
    row = {
        "single_rate": alone.decode_rate,
        "concurrent_rate": together.overall_rate,
        "bubble_ratio": bubble_ratio(await pipeline.stages()),
    }
    return row | ({"handoff_s": sum(handoffs) / len(handoffs)} if handoffs else {})


def bubble_ratio(stages: Sequence[dict[str, Any]]) -> float:
    """The share of time that stages were idle, while all of the steps that their meters show overlap."""
    spans = [[(step["started_at"], step["started_at"] + step["duration_s"]) for step in s["steps"]] for s in stages]
    began, ended = max(span[0][0] for span in spans), min(span[-1][1] for span in spans)
    busy = sum(max(0.0, min(end, ended) - max(start, began)) for span in spans for start, end in span)
    return 1 - busy / (len(spans) * (ended - began))


@contextlib.contextmanager
def _in_process(settings: Settings) -> Iterator[_InProcess]:
    process = ContestantProcess(NAME, settings)
    try:
        process.load()
        yield _InProcess(process)
    finally:
        process.close()


@contextlib.asynccontextmanager
async def _linked(settings: Settings, sizes: PipelineSizes) -> AsyncIterator[_Linked]:
    config = StageProcessConfig(
        settings.directory,
        settings.num_kv_tokens // BLOCK_SIZE,
        BLOCK_SIZE,
        torch.float32,
        max(1, settings.threads // settings.num_stages),
    )
    spans = partition(settings.config.n_layer, settings.num_stages, head_cost(settings.config))
    scheduler = new_scheduler(settings, sizes.num_concurrent)
    async with linked_stages(spans, config) as stages, LocalEngine(scheduler, stages) as engine:
        yield _Linked(engine, stages)
