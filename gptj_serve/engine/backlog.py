"""`WorkRate`: how fast an engine gets through work while more of it waits, so how long a queue will last.

Work is counted in tokens: those that are still to be computed, and those that may still be generated. What an answer
that ends early leaves is done with it. Requests of any mixture are counted alike, so a mixture that changes makes the
rate wrong for some seconds; the time that a queue takes is its work over the rate in any case.
"""

HALF_LIFE_S = 10.0
"""Of what is known, in time during which something waited."""

MIN_OBSERVED_S = 0.5
"""Before a rate says anything."""


class WorkRate:
    def __init__(self) -> None:
        self._done = 0.0
        self._observed_s = 0.0
        self._new = 0
        self._marked_at = 0.0
        self._is_saturated = False

    def add(self, num_tokens: int) -> None:
        """Work that was done since the last mark."""
        self._new += num_tokens

    def mark(self, now: float, *, is_saturated: bool) -> None:
        """Between two marks of which the first was saturated, the engine did as much as it could."""
        if self._is_saturated:
            elapsed_s = now - self._marked_at
            kept = 0.5 ** (elapsed_s / HALF_LIFE_S)
            self._done = self._done * kept + self._new
            self._observed_s = self._observed_s * kept + elapsed_s
        self._new = 0
        self._marked_at = now
        self._is_saturated = is_saturated

    def seconds_for(self, num_tokens: int) -> float:
        """How long so much work takes; 0 as long as that is not known."""
        if num_tokens == 0 or self._observed_s < MIN_OBSERVED_S:
            return 0.0
        return num_tokens * self._observed_s / max(self._done, 1.0)
