"""Requests to measure with: batches of equal prompts, and a trace's lengths and arrivals.

Prompts are random, each different from every other, so that no engine finds anything to reuse.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.streams import Request
from gptj_serve.model.config import GPTJConfig
from gptj_serve.profiling.load import trace_requests as planned_requests

Shape = tuple[float, int, int]
"""Arrival in seconds, prompt tokens, new tokens."""


def batch_requests(config: GPTJConfig, batch: int, num_prompt: int, num_new: int, seed: int) -> list[Request]:
    chance = random.Random(f"{batch} {num_prompt} {seed}")
    return [Request(0.0, _prompt(chance, config, num_prompt), num_new) for _ in range(batch)]


def read_trace(path: Path, n_positions: int, shrink: int = 1) -> list[Shape]:
    """The requests that fit the model when their lengths are divided by `shrink`."""
    shapes = [
        (planned.arrival_s, -(-planned.num_prompt_tokens // shrink), -(-planned.num_new_tokens // shrink))
        for planned in planned_requests(path, None, n_positions * shrink)
    ]
    return [shape for shape in shapes if shape[1] + shape[2] <= n_positions]


def drawn_shapes(n_positions: int) -> list[Shape]:
    """Without a trace: lengths with a long tail, arrivals at random."""
    chance = random.Random(0)
    shapes = []
    arrival_s = 0.0
    for _ in range(2000):
        arrival_s += chance.expovariate(1)
        num_prompt = 1 + int(chance.lognormvariate(0, 1) * n_positions / 8) % (n_positions * 3 // 4)
        shapes.append((arrival_s, num_prompt, chance.randint(2, n_positions // 8)))
    return shapes


def check_offer(shapes: Sequence[Shape], rate: float, seconds: float) -> None:
    """Raises `ValueError` if the trace is too short for it."""
    if (count := _count(rate, seconds)) >= len(shapes):
        raise ValueError(f"rate={rate:g} for {seconds:g} s takes {count} requests; the trace has {len(shapes)}")


def compressed(shapes: Sequence[Shape], rate: float, seconds: float, chance: random.Random) -> list[Shape]:
    """So many of the trace's next requests, its arrivals compressed (or stretched) to `rate` requests per second.

    Raises as `check_offer`.
    """
    check_offer(shapes, rate, seconds)
    count = _count(rate, seconds)
    first = chance.randrange(len(shapes) - count)
    chosen = shapes[first : first + count + 1]
    began_s = chosen[0][0]
    factor = seconds / max(1e-9, chosen[-1][0] - began_s)
    return [((arrival_s - began_s) * factor, num_prompt, num_new) for arrival_s, num_prompt, num_new in chosen[:-1]]


def trace_requests(
    config: GPTJConfig, shapes: Sequence[Shape], rate: float, seconds: float, seed: int
) -> list[Request]:
    """As `compressed`, with prompts."""
    chance = random.Random(seed)
    return [
        Request(arrival_s, _prompt(chance, config, num_prompt), num_new)
        for arrival_s, num_prompt, num_new in compressed(shapes, rate, seconds, chance)
    ]


def _count(rate: float, seconds: float) -> int:
    return max(1, round(rate * seconds))


def _prompt(chance: random.Random, config: GPTJConfig, num_tokens: int) -> list[int]:
    return [chance.randrange(1, config.vocab_size) for _ in range(num_tokens)]
