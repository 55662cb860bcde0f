"""`SimulatedRouter`: which pipeline a request goes to, as `serving.router` and `serving.replicas` have it.

The less loaded of two random pipelines, of those where it would wait shortest. Pipelines tell from time to time how
long their queue is, so what is known of it is some moments old.
"""

import random
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

TELL_PERIOD_S = 0.25
"""As `serving.pipeline_deployment.LOAD_PERIOD_S`."""

SAME_WAIT_S = 1.0
"""As in `serving.replicas`."""


class Queue(Protocol):
    """Of a pipeline, at the time that the router looks at it."""

    @property
    def num_waiting(self) -> int: ...

    def queue_wait_s(self) -> float:
        """How long a request that came now would wait."""


Q = TypeVar("Q", bound=Queue)


class SimulatedRouter(Generic[Q]):
    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)  # noqa: S311  # no secret
        self._running: list[Q] = []
        self._best: list[Q] = []
        self._told_s: dict[int, tuple[Q, float]] = {}  # by id(): those that have a queue, and how long it is

    @property
    def slow(self) -> list[Q]:
        """Those where a request would wait for longer than that counts as none."""
        return [queue for queue, wait_s in self._told_s.values() if wait_s > SAME_WAIT_S]

    @property
    def queued(self) -> list[Q]:
        return [queue for queue, _ in self._told_s.values()]

    def set_running(self, running: Sequence[Q]) -> None:
        self._running = list(running)
        ids = set(map(id, running))
        self._told_s = {key: told for key, told in self._told_s.items() if key in ids}
        self._rank()

    def shortest_wait_s(self) -> float:
        """0 as long as any has told of none."""
        if len(self._told_s) < len(self._running):
            return 0.0
        return min((wait_s for _, wait_s in self._told_s.values()), default=0.0)

    def pair(self) -> list[Q]:
        """Two random ones of the best, or the only one; none if none runs."""
        best = self._best
        if len(best) <= 2:
            return best
        first, second = int(self._chance.random() * len(best)), int(self._chance.random() * (len(best) - 1))
        return [best[first], best[second + (second >= first)]]

    def has_queue(self, queue: Q) -> None:
        """It will be asked how long it is."""
        self._told_s.setdefault(id(queue), (queue, 0.0))

    def refused(self, queue: Q) -> None:
        self._told_s[id(queue)] = (queue, queue.queue_wait_s())
        self._rank()

    def tell(self) -> None:
        """All that have a queue say how long it is now."""
        if self._told_s:
            self._told_s = {
                key: (queue, queue.queue_wait_s()) for key, (queue, _) in self._told_s.items() if queue.num_waiting
            }
            self._rank()

    def _rank(self) -> None:
        limit_s = self.shortest_wait_s() + SAME_WAIT_S
        slow = {key for key, (_, wait_s) in self._told_s.items() if wait_s > limit_s}
        self._best = [queue for queue in self._running if id(queue) not in slow] if slow else self._running
