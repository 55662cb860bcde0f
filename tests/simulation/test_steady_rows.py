"""The shortcut against the real scheduler, row by row: every time and every count, to the last bit."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.errors import OverloadedError
from gptj_serve.simulation.cost_model import CostModel, ModelShape
from gptj_serve.simulation.outcomes import Outcomes
from gptj_serve.simulation.pipeline import SimulatedPipeline
from gptj_serve.simulation.simulated_job import simulated_request
from gptj_serve.simulation.steady_rows import SteadyRows
from gptj_serve.simulation.steps_source import EveryRow, note_events
from gptj_serve.types import EngineRequest

COST = CostModel(
    source="estimated",
    model=ModelShape(name="x", num_layers=8, max_sequence_tokens=64, head_layers=1.5),
    stage_s=1e-4,
    weights_s=1e-4,
    token_s=1e-5,
    free_tokens=3,
    row_s=3e-6,
    context_s=1e-7,
    pair_s=3e-8,
    head_s=1e-4,
    sample_s=1e-5,
    handoff_s=5e-5,
    handoff_token_s=1e-6,
    engine_step_s=2e-4,
    engine_row_s=1e-5,
)
Load = list[tuple[float, int, int]]


class Run:
    """A load on one pipeline."""

    def __init__(self, requests: Load, limits: SchedulerLimits, blocks: KVBlocks, *, every_row: bool) -> None:
        self.outcomes = Outcomes(len(requests))
        self.blocks = blocks
        self.loads: list[Any] = []
        if every_row:
            self.pipeline: Any = SimulatedPipeline(
                lambda clock: self._every_row(limits, clock), COST.pipeline(limits.num_stages), limits.num_stages
            )
            self.scheduler: Scheduler = self.pipeline.source.scheduler
        else:
            self.pipeline = SimulatedPipeline(
                lambda clock: SteadyRows(limits, blocks, self.outcomes, clock),
                COST.pipeline(limits.num_stages),
                limits.num_stages,
            )
            self.scheduler = self.pipeline.source
        for index, (arrival_s, num_prompt, num_new) in enumerate(requests):
            self.pipeline.advance(arrival_s)
            request = simulated_request(index, num_prompt, num_new)
            try:
                self.pipeline.add(with_tokens(request, index) if every_row else request)
            except OverloadedError:
                self.outcomes.on_refused(index)
            self.loads.append(
                (self.scheduler.load(), self.scheduler.num_running, self.scheduler.queue_wait_s(), blocks.num_free)
            )
        self.pipeline.finish()
        self.scheduler.check_integrity()

    def _every_row(self, limits: SchedulerLimits, clock: Callable[[], float]) -> EveryRow:
        scheduler = Scheduler(limits, self.blocks, frozenset(), clock)
        return EveryRow(scheduler, lambda events: note_events(self.outcomes, clock(), events))

    @property
    def result(self) -> dict[str, Any]:
        found = self.outcomes
        return {
            "first": found.first_s.tobytes(),
            "last": found.last_s.tobytes(),
            "tokens": found.num_tokens.tolist(),
            "gaps": found.gap_counts.tolist(),
            "longest": found.longest_gap_s,
            "refused": found.num_refused,
            "end": self.pipeline.now,
            "preemptions": self.scheduler.num_preemptions,
            "reused": self.scheduler.num_prefix_tokens_reused,
            "loads": self.loads,
        }


def with_tokens(request: EngineRequest, index: int) -> EngineRequest:
    """As a client sends it: a list of tokens, of which no other prompt has the first."""
    prompt = [1000 + index, *[7] * (len(request.prompt_token_ids) - 1)]
    return msgspec.structs.replace(request, prompt_token_ids=prompt)


def both(requests: Load, limits: SchedulerLimits, num_blocks: int, block_size: int, *, reuse: bool) -> tuple[Run, Run]:
    return (
        Run(requests, limits, KVBlocks(num_blocks, block_size, reuse_prefixes=reuse), every_row=True),
        Run(requests, limits, KVBlocks(num_blocks, block_size, reuse_prefixes=reuse), every_row=False),
    )


@settings(max_examples=120)
@given(
    gaps=st.lists(
        st.tuples(st.sampled_from([0.0, 1e-4, 2e-3, 0.02, 1.0]), st.integers(1, 20), st.integers(1, 20)),
        min_size=1,
        max_size=60,
    ),
    num_stages=st.integers(1, 4),
    block_size=st.sampled_from([1, 4, 16]),
    num_tokens=st.sampled_from([40, 80, 200, 2000]),
    max_num_sequences=st.sampled_from([1, 3, 64]),
    budget=st.sampled_from([3, 16, 128]),
    max_queue_wait_s=st.sampled_from([0.05, 1.0, math.inf]),
    reuse=st.booleans(),
)
def test_every_time_and_count_is_that_of_the_real_scheduler(
    gaps: Load,
    num_stages: int,
    block_size: int,
    num_tokens: int,
    max_num_sequences: int,
    budget: int,
    max_queue_wait_s: float,
    reuse: bool,
):
    requests: Load = []
    for gap_s, num_prompt, num_new in gaps:
        requests.append((gap_s + (requests[-1][0] if requests else 0.0), num_prompt, num_new))
    limits = SchedulerLimits(num_stages, max_num_sequences, budget, 40, max_queue_wait_s)
    real, short = both(requests, limits, -(-num_tokens // block_size), block_size, reuse=reuse)
    assert short.result == real.result


@pytest.mark.parametrize("num_stages", [1, 3])
def test_a_long_load_that_preempts_and_refuses(num_stages: int):
    """Big enough that all of it happens, which the test says."""
    requests = [(0.001 * index, 1 + index * 7 % 23, 1 + index * 11 % 17) for index in range(600)]
    limits = SchedulerLimits(num_stages, 24, 32, 40, 0.3)
    real, short = both(requests, limits, 20, 4, reuse=True)
    assert short.result == real.result
    assert real.result["preemptions"] > 10
    assert real.result["refused"] > 10
    assert sum(real.result["tokens"]) > 1000


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_prompts_so_long_that_they_are_cut_for_the_stages(num_stages: int):
    requests = [(0.013 * index, 1 + index * 173 % 900, 1 + index * 11 % 40) for index in range(80)]
    limits = SchedulerLimits(num_stages, 24, 512, 1000)
    real, short = both(requests, limits, 600, 16, reuse=True)
    assert short.result == real.result
    assert sum(real.result["tokens"]) > 1000


def test_decoding_alone_is_one_repeated_step():
    """A hundred sequences over many steps: nothing but the first steps and the last is done row by row."""
    requests = [(0.0, 4, 30)] * 20
    limits = SchedulerLimits(2, 64, 128, 40)
    real, short = both(requests, limits, 500, 4, reuse=True)
    assert short.result == real.result
    assert real.outcomes.num_gaps == 20 * 29
