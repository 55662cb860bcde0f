"""How long a queue lasts: the work that waits, over how fast the engine gets through work while something waits.

Work is counted in tokens of two kinds, those of prompts and those to be generated, since one of the latter costs much
more: how much, `StepCosts` learns from the steps. What an answer that ends early leaves is done with it. So what is
told is right on average for any mixture of requests, and at once when a load begins, while prompts come first.
"""

from typing import NamedTuple

HALF_LIFE_S = 4.0
"""Of what is known of the rate, in time during which something waited; of the costs in time with steps in flight."""

MIN_OBSERVED_S = 0.5
"""Before a rate says anything."""

FIRST_COST = 8.0
MIN_COST, MAX_COST = 1.0, 200.0
"""Of a generated token in prompt tokens: as long as nothing is known, and at all."""


class Work(NamedTuple):
    """Tokens that are still to be computed, and tokens that may still be generated."""

    prompt: int = 0
    new: int = 0

    def plus(self, other: "Work") -> "Work":
        return Work(self.prompt + other.prompt, self.new + other.new)

    def minus(self, other: "Work") -> "Work":
        return Work(self.prompt - other.prompt, self.new - other.new)


NO_WORK = Work()


class StepCosts:
    """What a generated token costs, in prompt tokens: least squares over seconds = a * prompt tokens + b * decode rows,
    in which old steps fade. What a step costs in any case goes with its decode rows."""

    def __init__(self) -> None:
        self._pp = self._pn = self._nn = self._pt = self._nt = 0.0
        self.cost = FIRST_COST

    def observe(self, step: Work, elapsed_s: float) -> None:
        """A step that came `elapsed_s` after the one before, both in flight meanwhile."""
        kept = 0.5 ** (elapsed_s / HALF_LIFE_S)
        self._pp = self._pp * kept + step.prompt * step.prompt
        self._pn = self._pn * kept + step.prompt * step.new
        self._nn = self._nn * kept + step.new * step.new
        self._pt = self._pt * kept + step.prompt * elapsed_s
        self._nt = self._nt * kept + step.new * elapsed_s
        determinant = self._pp * self._nn - self._pn * self._pn
        if determinant <= 0.01 * self._pp * self._nn:
            return  # all steps are alike, or of one kind: no telling
        per_prompt = (self._pt * self._nn - self._nt * self._pn) / determinant
        per_new = (self._nt * self._pp - self._pt * self._pn) / determinant
        cost = per_new / per_prompt if per_prompt > 0 else MAX_COST
        self.cost = min(max(cost, MIN_COST), MAX_COST)


class WorkRate:
    """What is done between marks of which the first was saturated: then the engine did as much as it could."""

    def __init__(self) -> None:
        self._done = (0.0, 0.0)
        self._observed_s = 0.0
        self._new = NO_WORK
        self._marked_at = 0.0
        self._is_saturated = False

    def add(self, work: Work) -> None:
        """Done since the last mark."""
        self._new = self._new.plus(work)

    def mark(self, now: float, *, is_saturated: bool) -> None:
        if self._is_saturated:
            elapsed_s = now - self._marked_at
            kept = 0.5 ** (elapsed_s / HALF_LIFE_S)
            self._done = (self._done[0] * kept + self._new.prompt, self._done[1] * kept + self._new.new)
            self._observed_s = self._observed_s * kept + elapsed_s
        self._new = NO_WORK
        self._marked_at = now
        self._is_saturated = is_saturated

    def pause(self) -> None:
        """What follows until the next mark says nothing of how fast the engine is."""
        self._is_saturated = False

    def seconds_for(self, work: Work, cost: float) -> float:
        """How long so much work takes, at this cost of a generated token; 0 as long as that is not known."""
        if work == NO_WORK or self._observed_s < MIN_OBSERVED_S:
            return 0.0
        done = self._done[0] + cost * self._done[1]
        return (work.prompt + cost * work.new) * self._observed_s / max(done, 1.0)
