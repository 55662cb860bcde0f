"""`Rate`: how many of something there were in the last second."""

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 1.0


class Rate:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, count: int) -> None:
        self._counts.append((self._clock(), count))
        self._sum += count
        self._forget()

    def per_second(self) -> float:
        self._forget()
        return self._sum / WINDOW_S

    def _forget(self) -> None:
        start = self._clock() - WINDOW_S
        while self._counts and self._counts[0][0] < start:
            self._sum -= self._counts.popleft()[1]
