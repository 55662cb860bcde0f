"""`Graphs`: work that was captured at the start, by what it is for."""

import logging
import time
from collections.abc import Callable, Hashable, Sequence

from gptj_serve.pipeline.gpu.device import Device, Graph, Stream

LINE_INTERVAL_S = 10.0

logger = logging.getLogger(__name__)


class Graphs:
    def __init__(self, device: Device, stream: Stream) -> None:
        self._device = device
        self._stream = stream
        self._graphs: dict[Hashable, Graph] = {}

    def capture(self, works: Sequence[tuple[Hashable, Callable[[], object]]]) -> None:
        """The largest first: the others then find memory. How far it is, is a line in the log now and then."""
        started = last_line = time.monotonic()
        num_bytes = self._device.reserved_bytes()
        for num_captured, (key, work) in enumerate(works):
            self._graphs[key] = self._stream.capture(work)
            if time.monotonic() - last_line >= LINE_INTERVAL_S:
                last_line = time.monotonic()
                logger.info("captured %d of %d CUDA graphs", num_captured + 1, len(works))
        mebibytes = (self._device.reserved_bytes() - num_bytes) / 2**20
        logger.info("captured %d CUDA graphs in %.1f s, %.0f MiB", len(works), time.monotonic() - started, mebibytes)

    def replay(self, key: Hashable) -> None:
        self._graphs[key].replay()
