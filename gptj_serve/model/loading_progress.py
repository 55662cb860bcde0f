"""How far a load of weights is: a bar in a terminal, or now and then a line in a log. Quick loads say nothing."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

Progress = Callable[[int, int], None]
"""Called with the bytes that are loaded, and those that will be."""

BAR_DELAY_S = 2.0
LINE_INTERVAL_S = 10.0


def silent(num_loaded: int, num_bytes: int) -> None:
    """Nobody looks."""


@contextmanager
def terminal_bar(description: str, file: TextIO | None = None) -> Iterator[Progress]:
    """A bar on stderr, if that is a terminal and the load takes longer than `BAR_DELAY_S`."""
    stream = file or sys.stderr
    with tqdm(
        desc=description, unit="B", unit_scale=True, file=stream, disable=not stream.isatty(), delay=BAR_DELAY_S,
        leave=False,
    ) as bar:  # fmt: skip

        def advance(num_loaded: int, num_bytes: int) -> None:
            bar.total = num_bytes
            bar.update(num_loaded - bar.n)

        yield advance


class ProgressLines:
    """`Progress` as lines: one each `LINE_INTERVAL_S`, so none of a load that is faster."""

    def __init__(self, log: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._last_at = clock()

    def __call__(self, num_loaded: int, num_bytes: int) -> None:
        now = self._clock()
        if now - self._last_at >= LINE_INTERVAL_S and num_loaded < num_bytes:
            self._last_at = now
            self._log(f"{num_loaded / num_bytes:.0%} of {num_bytes / 1e9:.1f} GB loaded")
