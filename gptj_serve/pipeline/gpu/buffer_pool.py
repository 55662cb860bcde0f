"""`BufferPool`: buffers of one size that a step takes, and whoever has read what it left there gives back."""

from collections import deque
from collections.abc import Callable

from torch import Tensor

from gptj_serve.pipeline.gpu.device import Event, Stream

NUM_BUFFERS = 2
"""One for the step that is computed, one for the step whose results are on their way."""


class BufferPool:
    """Two buffers, and more if so many are not given back: those of steps that were cancelled never are.

    To be used from several threads.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._free: deque[tuple[Tensor, Event | None]] = deque((make(), None) for _ in range(NUM_BUFFERS))

    def take(self, stream: Stream) -> Tensor:
        """For work that is put into `stream` from now on."""
        try:
            buffer, read = self._free.popleft()
        except IndexError:
            return self._make()
        if read is not None:
            stream.follow(read)
        return buffer

    def give_back(self, buffer: Tensor, read: Event | None = None) -> None:
        """`read` is when the device will have read it; None: it has."""
        self._free.append((buffer, read))
