"""`WaitingQueue`: who waits for KV blocks, in what order, how long still, and who would wait too long."""

import math
from bisect import insort
from collections.abc import Iterator

from gptj_serve.engine.backlog import StepCosts, Work, WorkRate
from gptj_serve.engine.step import Entry
from gptj_serve.queue_wait import check_wait
from gptj_serve.types import EngineRequest

Rank = tuple[int, int]


class WaitingQueue:
    """Iterates over its entries by rank. Times are those of the scheduler's clock."""

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._entries: list[Entry] = []
        self._work_rate = WorkRate()
        self._step_costs = StepCosts()
        self._next_deadline = math.inf  # the first one, or earlier

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    @property
    def first(self) -> Entry | None:
        return self._entries[0] if self._entries else None

    def add(self, entry: Entry) -> None:
        insort(self._entries, entry, key=lambda entry: entry.rank)
        self._next_deadline = min(self._next_deadline, _deadline(entry))

    def remove(self, entry: Entry) -> None:
        self._entries.remove(entry)

    def remove_late(self, now: float) -> list[Entry]:
        """Those that wait for their first turn and have no time left for it, taken out."""
        if now < self._next_deadline:
            return []
        late = [entry for entry in self._entries if _deadline(entry) <= now]
        for entry in late:
            self._entries.remove(entry)
        self._next_deadline = min(map(_deadline, self._entries), default=math.inf)
        return late

    def wait_s(self, rank: Rank) -> float:
        """How long a request of this rank would wait for its turn, judged by what waits before it."""
        num_prompt = num_new = 0
        for entry in self._entries:
            if entry.rank > rank:
                break
            num_prompt += entry.work_left.prompt
            num_new += entry.work_left.new
        return self.seconds_for(Work(num_prompt, num_new))

    def seconds_for(self, work: Work) -> float:
        """How long so much work takes, at the speed shown lately while something waited; 0 where that is not known."""
        return self._work_rate.seconds_for(work, self._step_costs.cost)

    def check(self, request: EngineRequest, rank: Rank) -> None:
        """Raises `OverloadedError` if a request that comes now would wait for too long."""
        if not request.is_admitted:
            check_wait(self.wait_s(rank), self._max_wait_s, request.time_left_s)

    # ── what a wait is judged by ─────────────────────────────────────────────────────────────────────────

    def on_step(self, work: Work, elapsed_s: float) -> None:
        """Such a step came back so long after the one before."""
        self._step_costs.observe(work, elapsed_s)

    def on_done(self, work: Work) -> None:
        self._work_rate.add(work)

    def on_scheduled(self, now: float) -> None:
        """All has begun that could: who is still here waits for others to end."""
        self._work_rate.mark(now, is_saturated=bool(self._entries))

    def on_loss(self) -> None:
        """The pipeline is lost: nothing is done until it is back."""
        self._work_rate.pause()


def _deadline(entry: Entry) -> float:
    return math.inf if entry.was_preempted else entry.deadline
