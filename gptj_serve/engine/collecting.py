"""What comes of a sequence chunk by chunk, put together whatever the order and the cut of the chunks.

A preemption computes a sequence again, cut elsewhere, while results of the first attempt may still arrive. Values
are exact either way, so the first one for a position is as good as any.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32] | NDArray[np.float64]


@dataclass(slots=True)
class ValuesByPosition:
    """One row of numbers per position in [0, length)."""

    length: int
    _values: NDArray[np.float32] | None = None  # [length, columns]
    _is_known: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self._is_known = np.zeros(self.length, dtype=np.bool_)

    def add(self, start: int, values: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Take the rows [start, start + len(values)); all rows once the last one is here."""
        if self._values is None:
            self._values = np.empty((self.length, values.shape[1]), dtype=np.float32)
        self._values[start : start + len(values)] = values
        self._is_known[start : start + len(values)] = True
        return self._values if self._is_known.all() else None


@dataclass(slots=True)
class SumOverPositions:
    """The sum over positions [0, length), from sums over spans of them."""

    length: int
    _spans: list[tuple[int, int, Floats]] = field(default_factory=list)
    _sums: dict[int, Floats] = field(default_factory=dict)  # by end: over [0, end)

    def add(self, start: int, end: int, total: Floats) -> Floats | None:
        """Take the sum over [start, end); that over all positions once a chain of spans covers them."""
        self._spans.append((start, end, total.astype(np.float64)))
        grown = True
        while grown:
            grown = False
            for first, last, span_total in self._spans:
                if last not in self._sums and (first == 0 or first in self._sums):
                    self._sums[last] = span_total if first == 0 else self._sums[first] + span_total
                    grown = True
        return self._sums.get(self.length)
