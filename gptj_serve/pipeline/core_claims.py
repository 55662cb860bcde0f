"""Cores that a stage has for itself: claimed by locks on files, so that no two stages of a host take the same.

A lock ends with its process, however that ends. Claims of different users know nothing of each other.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

SYSTEM = Path("/sys/devices/system")


class Core(NamedTuple):
    """A logical CPU. `thread`: 0 for the first one of a physical core, 1 for its second hardware thread."""

    cpu: int  # as Linux numbers them
    node: int  # of NUMA
    thread: int


class CoreClaim:
    """Cores, until it is released or the process ends."""

    def __init__(self, locks: dict[int, int]) -> None:
        self._locks = locks  # core → file descriptor of its lock

    @property
    def cores(self) -> list[int]:
        return sorted(self._locks)

    def release(self) -> None:
        while self._locks:
            os.close(self._locks.popitem()[1])


def claim_cores(count: int, cores: Sequence[Core], directory: Path | None = None) -> CoreClaim | None:
    """So many of `cores` that nobody has claimed; None if there are too few.

    Of one NUMA node if one has enough, so that a stage's memory is near all of its threads; and physical cores before
    second hardware threads, which share one's arithmetic units.
    """
    directory = directory or Path(tempfile.gettempdir()) / f"gptj_serve-cores-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    by_node = [[core for core in cores if core.node == node] for node in sorted({core.node for core in cores})]
    for candidates in (*by_node, cores):
        claim = _claim(count, sorted(candidates, key=lambda core: (core.thread, core.cpu)), directory)
        if claim is not None:
            return claim
    return None


def available_cores(system: Path = SYSTEM) -> list[Core]:
    """Those that this process may use. Where the system doesn't tell, all are on one node, each a physical core."""
    nodes: dict[int, int] = {}
    for file in system.glob("node/node*/cpulist"):
        for index in _listed(file):
            nodes[index] = int(file.parent.name.removeprefix("node"))
    found = []
    for index in sorted(os.sched_getaffinity(0)):
        siblings = sorted(_listed(system / f"cpu/cpu{index}/topology/thread_siblings_list")) or [index]
        found.append(Core(index, nodes.get(index, 0), siblings.index(index) if index in siblings else 0))
    return found


def pin_process(cores: Iterable[int]) -> None:
    """All threads that there are; those that come inherit it."""
    cores = set(cores)
    for task in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(task), cores)
        except ProcessLookupError:  # it has just ended
            continue


def _claim(count: int, cores: Sequence[Core], directory: Path) -> CoreClaim | None:
    locks: dict[int, int] = {}
    claim = CoreClaim(locks)
    for core in cores:
        if len(locks) == count:
            break
        file = os.open(directory / f"core-{core.cpu}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
        else:
            locks[core.cpu] = file
    if len(locks) == count:
        return claim
    claim.release()
    return None


def _listed(file: Path) -> set[int]:
    """Of a file such as `0-3,8`; nothing if there is none."""
    try:
        text = file.read_text().strip()
    except OSError:
        return set()
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
