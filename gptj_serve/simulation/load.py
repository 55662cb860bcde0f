"""`SimulatedLoad`: the requests of a trace, at its rate or more often."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptj_serve.profiling.load import PlannedRequest

COPY_SPREAD_S = 30.0
"""Each copy of a request arrives up to so long after the request: bursts of the trace stay, but not to the moment."""


@dataclass(frozen=True, slots=True)
class SimulatedLoad:
    """In the order of arrival."""

    arrival_s: NDArray[np.float64]
    num_prompt_tokens: NDArray[np.int32]
    num_new_tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.arrival_s)


def make_load(planned: list[PlannedRequest], rate: float = 1.0, copies: int = 1, seed: int = 0) -> SimulatedLoad:
    """`rate`: in 1 / rate of the time. `copies`: each request so many times, the copies spread over the time before the
    rate is applied: the same hour with more users."""
    arrival_s = np.tile(np.array([request.arrival_s for request in planned]), copies)
    prompt = np.tile(np.array([request.num_prompt_tokens for request in planned], dtype=np.int32), copies)
    new = np.tile(np.array([request.num_new_tokens for request in planned], dtype=np.int32), copies)
    arrival_s[len(planned) :] += np.random.default_rng(seed).uniform(0, COPY_SPREAD_S, len(arrival_s) - len(planned))
    arrival_s /= rate
    order = np.argsort(arrival_s, kind="stable")
    return SimulatedLoad(arrival_s[order], prompt[order], new[order])
