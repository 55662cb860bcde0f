"""`Cohort`: sequences that decode together, a token each in every step, without being looked at one by one."""

from collections.abc import Iterator
from heapq import heappop, heappush
from typing import cast

from gptj_serve.engine.step import Entry
from gptj_serve.simulation.simulated_job import SimulatedGeneration
from gptj_serve.simulation.step_shape import StepShape

End = tuple[int, tuple[int, int], Entry]
"""After which step of the cohort a sequence ends; its rank; the sequence."""


class Cohort:
    """What a sequence has is told by the cohort's number of steps and its own state when it joined; it is written back
    only where somebody looks.

    Each has one token that is not computed yet, or is in flight. A sequence needs another KV block every
    `block_size` steps: `phases` has them by the step in which they do.
    """

    __slots__ = ("block_size", "ends", "last_s", "num_left", "num_rows", "num_steps", "num_tokens", "parts", "phases")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.num_steps = 0
        self.num_rows = 0
        self.num_tokens = 0  # of all its sequences together
        self.num_left = 0  # tokens to make, of all together
        self.ends: list[End] = []  # a heap of all its sequences
        self.phases: list[list[Entry]] = [[] for _ in range(block_size)]
        self.parts: list[tuple[float, int]] = []  # when its sequences got their last token, and how many then
        self.last_s = 0.0  # of its last step

    @property
    def shape(self) -> StepShape:
        """Of a microbatch of its sequences alone: each computes one token, which attends to all that it has."""
        return StepShape(self.num_rows, self.num_rows, self.num_tokens, self.num_tokens, self.num_rows)

    def join(self, entry: Entry, num_tokens: int, num_left: int, last_s: float) -> None:
        """A sequence of so many tokens, the last at `last_s`, which has so many more to make.

        `parts` is the caller's affair.
        """
        job = job_of(entry)
        job.base = num_tokens - self.num_steps
        job.joined_at_step, job.last_s = self.num_steps, last_s
        heappush(self.ends, (self.num_steps + num_left, entry.rank, entry))
        self.phases[job.base % self.block_size].append(entry)
        self.num_rows += 1
        self.num_tokens += num_tokens
        self.num_left += num_left

    def absorb(self, other: "Cohort") -> None:
        for end, _, entry in other.ends:
            last_s = other.last_token_s(entry)
            self.join(entry, job_of(entry).base + other.num_steps, end - other.num_steps, last_s)
        self.parts += other.parts

    def in_need_of_a_block(self) -> list[Entry]:
        """Those whose next token is the first of a KV block."""
        return self.phases[(1 - self.num_steps) % self.block_size]

    def last_token_s(self, entry: Entry) -> float:
        job = job_of(entry)
        return job.last_s if job.joined_at_step == self.num_steps else self.last_s

    def step(self, now: float) -> list[Entry]:
        """Each has got its token now; returns those that have ended, by rank."""
        self.advance(now)
        ended = []
        while self.ends and self.ends[0][0] == self.num_steps:
            entry = heappop(self.ends)[2]
            base = job_of(entry).base
            self.phases[base % self.block_size].remove(entry)
            self.num_rows -= 1
            self.num_tokens -= base + self.num_steps
            ended.append(entry)
        self.parts = [(now, self.num_rows)]
        return ended

    def advance(self, now: float) -> None:
        """Each has got its token now, and none has ended."""
        self.num_steps += 1
        self.num_tokens += self.num_rows
        self.num_left -= self.num_rows
        self.parts = [(now, self.num_rows)]
        self.last_s = now

    def write_back(self, entry: Entry, num_left: int) -> None:
        """What the sequence has by now, as its last token is not computed yet."""
        job = job_of(entry)
        num_tokens = job.base + self.num_steps
        sequence = job.sequence
        job.grow(num_tokens - len(sequence.token_ids))
        assert job.num_left == num_left
        sequence.num_computed = num_tokens - 1

    def __iter__(self) -> Iterator[tuple[Entry, int]]:
        """Each sequence, and how many tokens it has still to make."""
        return ((entry, end - self.num_steps) for end, _, entry in self.ends)


def job_of(entry: Entry) -> SimulatedGeneration:
    return cast(SimulatedGeneration, entry.job)
