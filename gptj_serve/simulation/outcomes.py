"""`Outcomes`: when each request of a load got its tokens, as far as its figures need it."""

import math
from array import array
from itertools import chain

BINS_PER_OCTAVE = 64
"""Times between tokens are counted in bins 1.1 % wide: hundreds of millions of them would not fit otherwise."""

_SHORTEST_S = 1e-6
_NUM_BINS = 40 * BINS_PER_OCTAVE  # up to some days


class Outcomes:
    """Of the requests of a load, by their index in it. A time that never came is NaN."""

    def __init__(self, num_requests: int, max_gap_s: float = math.inf) -> None:
        """`max_gap_s`: times between tokens above it are counted by themselves, exactly."""
        nothing = array("d", [math.nan])
        self.arrived_s = nothing * num_requests
        self.first_s = nothing * num_requests
        self.last_s = nothing * num_requests  # the newest token, and so in the end the last
        self.num_tokens = array("q", [0]) * num_requests  # generated, of those that have ended
        self.gap_counts = array("q", [0]) * _NUM_BINS
        self.num_gaps = 0
        self.num_slow_gaps = 0
        self.longest_gap_s = 0.0
        self.num_refused = 0
        self._max_gap_s = max_gap_s

    def on_token(self, index: int, now: float) -> None:
        last_s = self.last_s[index]
        if last_s != last_s:  # NaN
            self.first_s[index] = now
        else:
            self.on_gaps(now - last_s, 1)
        self.last_s[index] = now

    def on_gaps(self, gap_s: float, count: int) -> None:
        """So many sequences got a token so long after the one before it."""
        self.gap_counts[int(math.log2(gap_s / _SHORTEST_S) * BINS_PER_OCTAVE) if gap_s > _SHORTEST_S else 0] += count
        self.num_gaps += count
        if gap_s > self._max_gap_s:
            self.num_slow_gaps += count
        if gap_s > self.longest_gap_s:
            self.longest_gap_s = gap_s

    def on_end(self, index: int, num_tokens: int) -> None:
        self.num_tokens[index] = num_tokens

    def on_refused(self, index: int) -> None:
        self.num_refused += 1

    @property
    def end_s(self) -> float:
        """Of the last token, or of the last arrival if that was refused later than any token came."""
        return max((time_s for time_s in chain(self.arrived_s, self.last_s) if time_s == time_s), default=0.0)

    def gap_percentile(self, share: float) -> float:
        """The middle of the bin that it is in; 0 of nothing."""
        wanted = math.ceil(share * self.num_gaps)
        seen = 0
        for index, count in enumerate(self.gap_counts):
            seen += count
            if count and seen >= wanted:
                return float(_SHORTEST_S * 2.0 ** ((index + 0.5) / BINS_PER_OCTAVE))
        return 0.0
