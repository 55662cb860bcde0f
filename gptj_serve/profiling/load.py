"""What a profiled engine is asked: requests of given lengths, one size for all or those of a trace.

Errors are `ConfigError`, or `DataError` for a trace; each names the option, or file and line.
"""

import csv
import math
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from gptj_serve.errors import ConfigError, DataError
from gptj_serve.types import EngineRequest, SamplingParams, Task


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    arrival_s: float  # after the first one's
    num_prompt_tokens: int
    num_new_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_new_tokens

    def request(self, request_id: str, num_token_ids: int) -> EngineRequest:
        """Greedy, of exactly so many tokens; prompts are random, so no two of them have a beginning in common."""
        chance = random.Random(request_id)  # noqa: S311  # no secret
        prompt = chance.choices(range(num_token_ids), k=self.num_prompt_tokens)
        sampling = SamplingParams(max_new_tokens=self.num_new_tokens, ignore_eos=True)
        return EngineRequest(request_id=request_id, task=Task.GENERATE, prompt_token_ids=prompt, sampling=sampling)


@dataclass(frozen=True, slots=True)
class Load:
    """`max_concurrency` requests at a time, the next as soon as one ends; None: each when it is due."""

    requests: list[PlannedRequest]
    max_concurrency: int | None


def uniform_requests(
    num_requests: int, num_prompt_tokens: int, num_new_tokens: int, max_tokens: int
) -> list[PlannedRequest]:
    """All due at once. `max_tokens` is what a sequence may have."""
    planned = PlannedRequest(0.0, num_prompt_tokens, num_new_tokens)
    if planned.num_tokens > max_tokens:
        raise ConfigError(
            f"--prompt-tokens={num_prompt_tokens}, --new-tokens={num_new_tokens}: together {planned.num_tokens}; the "
            f"model's n_positions={max_tokens} is the most that a sequence may have"
        )
    return [planned] * num_requests


def trace_requests(trace: Path, num_requests: int | None, max_tokens: int) -> list[PlannedRequest]:
    """The first so many (None: all) of a CSV file that fit into `max_tokens` and have an output.

    Its lines, after that of the names, begin with arrival (seconds, or a date and time), prompt tokens and output
    tokens, in the order of arrival.
    """
    try:
        with trace.open(newline="", encoding="utf-8") as file:
            fitting = (r for r in _rows(trace, file) if r.num_new_tokens and r.num_tokens <= max_tokens)
            requests = list(islice(fitting, num_requests))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{trace}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    if not requests:
        raise DataError(f"{trace}: has no request of 1 to {max_tokens} tokens with an output: the model's n_positions")
    first_s = requests[0].arrival_s
    return [PlannedRequest(r.arrival_s - first_s, r.num_prompt_tokens, r.num_new_tokens) for r in requests]


def _rows(trace: Path, file: Iterator[str]) -> Iterator[PlannedRequest]:
    latest_s = -math.inf
    for number, row in enumerate(csv.reader(file), start=1):
        if number == 1 or not row:
            continue
        source = f"{trace}:{number}"
        if len(row) < 3:
            raise DataError(f"{source}: {','.join(row)!r}: must have arrival, prompt tokens and output tokens")
        arrival_s = _seconds(row[0], source)
        if arrival_s < latest_s:
            raise DataError(f"{source}: arrival={row[0]!r}: is before that of the line above")
        latest_s = arrival_s
        yield PlannedRequest(
            arrival_s, _count(row[1], "prompt tokens", 1, source), _count(row[2], "output tokens", 0, source)
        )


def _seconds(text: str, source: str) -> float:
    """Without a time zone a time is UTC: in local time some hours come twice, or not at all."""
    with suppress(ValueError):
        if math.isfinite(seconds := float(text)):
            return seconds
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise DataError(f"{source}: arrival={text!r}: must be seconds, or a date and time in ISO format") from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _count(text: str, name: str, least: int, source: str) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise DataError(f"{source}: {name}={text!r}: must be a whole number, at least {least}")
    return int(text)
