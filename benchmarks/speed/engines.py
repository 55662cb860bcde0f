"""The contestants of a run: who is here and fits into memory, who is loaded together, and whose turn it is."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import psutil

from benchmarks.speed.contestants import (
    CONTESTANTS,
    ContestantError,
    ContestantProcess,
    Settings,
    held_bytes,
    missing,
    passing_bytes,
)
from benchmarks.speed.results import Results
from benchmarks.speed.streams import Request, Stream

MEMORY_SHARE = 0.85
"""Of what is available, for the contestants."""

NO_LIMIT_S = 1e6

Log = Callable[[str], None]


class Engines:
    """The contestants that are here and fit into memory: all at once, or if they don't, each alone."""

    def __init__(self, names: Sequence[str], settings: Settings, results: Results, log: Log) -> None:
        self._settings = settings
        self._results = results
        self._log = log
        self._names = [name for name in names if self._is_here(name)]

    def shifts(self) -> list[list[str]]:
        """Who is loaded at the same time; within a shift turns are taken round by round."""
        contestants = [CONTESTANTS[name] for name in self._names]
        held = sum(held_bytes(contestant, self._settings) for contestant in contestants)
        peak = held + max((passing_bytes(contestant, self._settings) for contestant in contestants), default=0)
        return [self._names] if peak <= usable_memory_bytes() else [[name] for name in self._names]

    @contextlib.contextmanager
    def loaded(self, shift: Sequence[str]) -> Iterator[dict[str, ContestantProcess]]:
        processes = {name: ContestantProcess(name, self._settings) for name in shift}
        try:
            for name, process in list(processes.items()):
                self._log(f"loading {name}")
                try:
                    process.load()
                except ContestantError as error:
                    self._leave_out(processes, name, error)
                else:
                    self._results.contestants[name] = process.facts
            yield processes
        finally:
            for process in processes.values():
                process.close()

    def turn(
        self,
        processes: dict[str, ContestantProcess],
        names: Sequence[str],
        requests: Sequence[Request],
        max_batch: int,
        limit_s: float = NO_LIMIT_S,
    ) -> dict[str, list[Stream]]:
        """The streams of each of `names`, one after another; who fails is out from then on."""
        found = {}
        for name in [name for name in names if name in processes]:
            try:
                found[name] = processes[name].generate(requests, max_batch, limit_s)
            except ContestantError as error:
                self._leave_out(processes, name, error)
        return found

    def _leave_out(self, processes: dict[str, ContestantProcess], name: str, error: ContestantError) -> None:
        processes.pop(name).close()
        self._results.left_out[name] = str(error)
        self._log(f"left out: {error}")

    def _is_here(self, name: str) -> bool:
        contestant = CONTESTANTS[name]
        reason = missing(contestant)
        needed = held_bytes(contestant, self._settings) + passing_bytes(contestant, self._settings)
        if reason is None and needed > usable_memory_bytes():
            reason = f"needs about {needed / 2**30:.0f} GiB to load, {usable_memory_bytes() / 2**30:.0f} may be taken"
        if reason is not None:
            self._results.left_out[name] = reason
            self._log(f"without {name}: {reason}")
        return reason is None


def usable_memory_bytes() -> int:
    """For contestants, now."""
    return int(MEMORY_SHARE * psutil.virtual_memory().available)
