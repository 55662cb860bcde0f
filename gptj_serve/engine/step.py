"""`Entry`, a job in the scheduler's books, and `Step`, a microbatch with what it is for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from gptj_serve.engine.backlog import NO_WORK, Work
from gptj_serve.engine.job import Job, Ride
from gptj_serve.steps import Row, SampleSpec

MAX_LOSSES_TOGETHER = 2
"""Losses of the pipeline in a row, while it computed a request, after which the request is computed alone."""


@dataclass(slots=True, eq=False)
class Entry:
    """A job and its place in the order of service."""

    job: Job
    rank: tuple[int, int]
    waits_since: float
    work_left: Work  # as last counted
    deadline: float  # it is not begun after that
    is_running: bool = False
    was_preempted: bool = False
    num_losses: int = 0  # of the pipeline, since it last got further

    @property
    def is_suspect(self) -> bool:
        return self.num_losses >= MAX_LOSSES_TOGETHER


class Feed(NamedTuple):
    """What a row is made of while its token is still being chosen."""

    row_index: int  # of the microbatch before: that row chooses it
    spec: SampleSpec  # how the token after it is chosen


@dataclass(slots=True)
class Step:
    """A microbatch in the making; afterwards, what is known of it while it is in flight."""

    budget: int  # tokens that still fit
    prompt_budget: int  # of these, tokens of prompts
    rows: list[Row] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    riders: list[tuple[Entry, list[Ride]]] = field(default_factory=list)  # in the order of the rows
    booked: set[Entry] = field(default_factory=set)  # those that have a row, or blocks for one
    feeding: Mapping[Entry, Feed] = field(default_factory=dict)
    sampling: dict[Entry, int] = field(default_factory=dict)  # their (last) row that chooses tokens
    work: Work = NO_WORK  # its tokens; those of decode rows as new ones

    def carries(self, entry: Entry) -> bool:
        return entry in self.booked

    def add(self, entry: Entry, ride: Ride) -> None:
        if not self.riders or self.riders[-1][0] is not entry:
            self.riders.append((entry, []))
            self.booked.add(entry)
        self.riders[-1][1].append(ride)
        if ride.row.samples:
            self.sampling[entry] = len(self.rows)
        self.rows.append(ride.row)
        num_tokens, num_samples = len(ride.row.token_ids), len(ride.row.samples)
        is_decoding = num_tokens == num_samples  # the last token, and a draft if there is one
        self.work = self.work.plus(Work(num_tokens - 1, 1) if is_decoding else Work(num_tokens))

    def remove(self, entry: Entry) -> None:
        """Take back the rows of the entry that was added last, if it has any."""
        if self.riders and self.riders[-1][0] is entry:
            del self.rows[-len(self.riders.pop()[1]) :]
            self.sampling.pop(entry, None)
