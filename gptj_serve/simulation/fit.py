"""Coefficients from measurements: of the stages by least squares, of the engine by trying what the simulation gives."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.scheduler import SchedulerLimits
from gptj_serve.simulation.cost_model import CostModel
from gptj_serve.simulation.outcomes import Outcomes
from gptj_serve.simulation.pipeline import SimulatedPipeline
from gptj_serve.simulation.simulated_job import simulated_request
from gptj_serve.simulation.steady_rows import SteadyRows
from gptj_serve.simulation.step_shape import StepShape

FREE_TOKENS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_STAGE_TIMES = ("stage_s", "weights_s", "token_s", "row_s", "context_s", "pair_s", "head_s", "sample_s")


class StageTime(NamedTuple):
    """What a microbatch took on a stage."""

    shape: StepShape
    num_layers: int
    is_last: bool
    seconds: float


def fit_stages(cost: CostModel, times: Sequence[StageTime]) -> CostModel:
    """With the stages' coefficients that make the sum of squared relative errors least, none below 0."""
    best: tuple[float, float, NDArray[np.float64]] | None = None
    for free_tokens in FREE_TOKENS:
        rows = np.array([_features(time, free_tokens) for time in times])
        rows /= np.array([[time.seconds] for time in times])
        solution = non_negative_least_squares(rows, np.ones(len(times)))
        error = float(np.square(rows @ solution - 1).sum())
        if best is None or error < best[0]:
            best = (error, free_tokens, solution)
    assert best is not None
    return cost.model_copy(update={"free_tokens": best[1]} | dict(zip(_STAGE_TIMES, best[2].tolist(), strict=True)))


def stage_errors(cost: CostModel, times: Sequence[StageTime]) -> NDArray[np.float64]:
    """Relative, of each."""
    solution = np.array([getattr(cost, field) for field in _STAGE_TIMES])
    predicted = np.array([_features(time, cost.free_tokens) for time in times]) @ solution
    errors: NDArray[np.float64] = predicted / np.array([time.seconds for time in times]) - 1
    return errors


def _features(time: StageTime, free_tokens: float) -> list[float]:
    shape, layers = time.shape, time.num_layers
    beyond = max(0.0, shape.num_tokens - free_tokens)
    per_layer = [1.0, beyond, shape.num_rows, shape.num_context_tokens, shape.num_pairs]
    return [1.0, *(layers * value for value in per_layer), float(time.is_last), time.is_last * shape.num_samples]


def non_negative_least_squares(rows: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """x >= 0 with the least |rows @ x - values|, coordinate by coordinate (the problem is convex)."""
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0] = 1.0
    gram, target = (rows / scale).T @ (rows / scale), (rows / scale).T @ values
    x = np.zeros(rows.shape[1])
    for _ in range(20_000):
        before = x.copy()
        for index in range(len(x)):
            if gram[index, index] > 0:
                gradient = float(gram[index] @ x) - float(target[index])
                x[index] = max(0.0, x[index] - gradient / gram[index, index])
        if np.abs(x - before).max() < 1e-12:
            break
    found: NDArray[np.float64] = x / scale
    return found


# ------------------------------------------------------------------------------------------------ the engine


class Asked(NamedTuple):
    """Requests of which so many run at a time, the next as soon as one has ended."""

    max_concurrency: int
    lengths: Sequence[tuple[int, int]]  # prompt and new tokens of each

    @property
    def num_new_tokens(self) -> int:
        return sum(num_new for _, num_new in self.lengths)


class Round(NamedTuple):
    """What came of them."""

    asked: Asked
    tokens_per_s: float
    first_token_s: float  # the median, each from when it could begin


def fit_engine(
    cost: CostModel,
    limits: SchedulerLimits,
    num_kv_blocks: int,
    block_size: int,
    rounds: Sequence[Round],
    *,
    scales_stages: bool = True,
) -> CostModel:
    """With `engine_step_s`, `engine_row_s` and `request_s` under which the simulation gives these rounds best, and the
    stages' coefficients by a common factor more or less, unless that is known already (`scales_stages`).

    Stages are measured one at a time; here they, the engine and whatever a client is to it share a machine's cores,
    caches and memory. What these take from each other is in the factor, what it does not explain is the engine's.
    """
    few = [measured for measured in rounds if measured.asked.max_concurrency <= 2 * limits.num_stages]

    def simulated(candidate: CostModel, measured: Round) -> Round:
        return simulate_round(candidate, limits, num_kv_blocks, block_size, measured.asked)

    def with_request_s(candidate: CostModel) -> CostModel:
        """Of rounds in which requests hardly wait for each other."""
        candidate = candidate.model_copy(update={"request_s": 0.0})
        more_s = [measured.first_token_s - simulated(candidate, measured).first_token_s for measured in few]
        return candidate.model_copy(update={"request_s": max(0.0, float(np.median(more_s)))})

    def error(candidate: CostModel) -> float:
        candidate = with_request_s(candidate)
        return sum(
            math.log(simulated(candidate, measured).tokens_per_s / measured.tokens_per_s) ** 2 for measured in rounds
        )

    cost = cost.model_copy(update={"engine_step_s": 2e-4, "engine_row_s": 2e-5})
    knobs = [("engine_step_s",), ("engine_row_s",), *([_STAGE_TIMES] if scales_stages else [])]
    return with_request_s(_descend(cost, knobs, error))


def _descend(cost: CostModel, knobs: Sequence[Sequence[str]], error: Callable[[CostModel], float]) -> CostModel:
    """The fields of each knob by a common factor up or down, as long as it helps; then by a smaller one."""
    least = error(cost)
    factor = 4.0
    while factor > 1.02:
        improved = False
        for fields in knobs:
            for change in (factor, 1 / factor):
                candidate = cost.model_copy(update={field: getattr(cost, field) * change for field in fields})
                if (found := error(candidate)) < 0.999 * least:  # else what hardly matters would go to 0 step by step
                    cost, least, improved = candidate, found, True
        if not improved:
            factor = math.sqrt(factor)
    return cost


def simulate_round(
    cost: CostModel, limits: SchedulerLimits, num_kv_blocks: int, block_size: int, asked: Asked
) -> Round:
    num_sequences = min(limits.max_num_sequences, asked.max_concurrency)
    limits = replace(limits, max_num_sequences=num_sequences, max_queue_wait_s=math.inf)
    outcomes = Outcomes(len(asked.lengths))
    pipeline = SimulatedPipeline(
        lambda clock: SteadyRows(limits, KVBlocks(num_kv_blocks, block_size), outcomes, clock),
        cost.pipeline(limits.num_stages),
        limits.num_stages,
    )
    for index, (num_prompt_tokens, num_new_tokens) in enumerate(asked.lengths):
        pipeline.add(simulated_request(index, num_prompt_tokens, num_new_tokens))
    pipeline.finish()
    # Each request is on its way for request_s, during which its place is empty
    duration_s = pipeline.now + cost.request_s * len(asked.lengths) / asked.max_concurrency
    begun_s = [0.0] * asked.max_concurrency + sorted(outcomes.last_s)
    waits_s = [first_s - begun for first_s, begun in zip(sorted(outcomes.first_s), begun_s, strict=False)]
    return Round(asked, asked.num_new_tokens / duration_s, float(np.median(waits_s)) + cost.request_s)
