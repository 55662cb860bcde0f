"""Requests, the streams of tokens that come of them, and what is read off their times."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gptj_serve.profiling.percentile import percentile


class Request(NamedTuple):
    arrival_s: float  # since the run's beginning
    prompt: list[int]
    num_new_tokens: int


@dataclass(slots=True)
class Stream:
    """One request's tokens and when each of them came, in seconds since the run's beginning."""

    arrival_s: float
    times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def add(self, now_s: float, token_id: int) -> None:
        self.times.append(now_s)
        self.token_ids.append(token_id)


class BatchFigures(NamedTuple):
    """Of requests that came at once; rates are in tokens per second."""

    prefill_s: float  # until the last of them has its first token
    step_s: float  # between two tokens of a sequence, while all of them decode
    decode_rate: float
    overall_rate: float


class LoadFigures(NamedTuple):
    """Of requests that came over time, and of what came of them until its end: a batch that an engine finishes after
    it is cut there. Those without a first token by then count with the time that they waited."""

    output_rate: float  # tokens per second, after the first third of the time
    ttft_p50_s: float
    ttft_p99_s: float
    intertoken_p50_s: float
    intertoken_p99_s: float
    num_unfinished: int


def batch_figures(streams: Sequence[Stream]) -> BatchFigures:
    began, ended = max(stream.times[0] for stream in streams), min(stream.times[-1] for stream in streams)
    steps = []
    for stream in streams:
        times = [at for at in stream.times if began <= at <= ended]
        if len(times) > 1:
            steps.append((times[-1] - times[0]) / (len(times) - 1))
    step_s = statistics.mean(steps) if steps else float("nan")
    num_tokens = sum(len(stream.times) for stream in streams)
    overall = num_tokens / max(stream.times[-1] for stream in streams)
    return BatchFigures(began, step_s, len(streams) / step_s, overall)


def load_figures(requests: Sequence[Request], streams: Sequence[Stream], seconds: float) -> LoadFigures:
    window = (seconds / 3, seconds)
    times_of = [[at for at in stream.times if at <= seconds] for stream in streams]
    num_tokens = sum(window[0] < at for times in times_of for at in times)
    pairs = list(zip(requests, times_of, strict=True))
    firsts = [(times[0] if times else seconds) - request.arrival_s for request, times in pairs]
    gaps = [later - at for times in times_of for at, later in itertools.pairwise(times)]
    return LoadFigures(
        num_tokens / (window[1] - window[0]),
        percentile(firsts, 0.5),
        percentile(firsts, 0.99),
        percentile(gaps, 0.5),
        percentile(gaps, 0.99),
        sum(len(times) < request.num_new_tokens for request, times in pairs),
    )


def agreement(streams: Sequence[Stream], expected: Sequence[Stream]) -> float:
    """The share of tokens before the first that differs: of two greedy runs of the same weights."""
    same = total = 0
    for stream, other in zip(streams, expected, strict=True):
        pairs = list(zip(stream.token_ids, other.token_ids, strict=True))
        total += len(pairs)
        same += next((index for index, (one, two) in enumerate(pairs) if one != two), len(pairs))
    return same / total
