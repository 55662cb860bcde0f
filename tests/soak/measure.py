"""What a service's processes hold, and how it grows."""

import math
import statistics
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray.util.state import list_actors, list_placement_groups

from tests.chaos.faults import Processes, Resources, Role, resources_of

MAX_MEMORY_SLOPE_MIB_PER_H = 16.0
"""A process that leaks 1 KiB with each of five requests per second grows by 18 MiB in an hour."""

NUM_STANDARD_ERRORS = 3.0
"""How sure a slope must be to count: a short soak's fit says little."""

MIN_GROWTH_MIB = 8.0
"""What grew by less in all is no slope but an allocator's step."""

MAX_MORE_TASKS, MAX_MORE_FILES, MAX_MORE_THREADS = 4, 8, 8
"""Per process, at rest: Ray keeps connections and threads that it had needed once."""


@dataclass(frozen=True)
class Fit:
    """A straight line through a process's memory over time."""

    slope_mib_per_h: float
    standard_error: float
    growth_mib: float

    @property
    def is_leak(self) -> bool:
        least = self.slope_mib_per_h - NUM_STANDARD_ERRORS * self.standard_error
        return least > MAX_MEMORY_SLOPE_MIB_PER_H and self.growth_mib > MIN_GROWTH_MIB


def fit(times_s: Sequence[float], memory_bytes: Sequence[int]) -> Fit:
    """Least squares; with fewer than three samples there is no standard error, and an infinite one is given."""
    hours = [at / 3600 for at in times_s]
    mib = [value / 2**20 for value in memory_bytes]
    if len(hours) < 3:
        return Fit(0.0, math.inf, 0.0)
    slope, intercept = statistics.linear_regression(hours, mib)
    residual = sum((y - slope * x - intercept) ** 2 for x, y in zip(hours, mib, strict=True))
    spread = sum((x - statistics.mean(hours)) ** 2 for x in hours)
    return Fit(slope, math.sqrt(residual / (len(hours) - 2) / spread), slope * (hours[-1] - hours[0]))


@dataclass
class Samples:
    """Of every process that descends from the service's, by `role pid`."""

    times_s: dict[str, list[float]] = field(default_factory=dict)
    memory_bytes: dict[str, list[int]] = field(default_factory=dict)

    def add(self, at_s: float, by_process: dict[str, Resources]) -> None:
        for name, resources in by_process.items():
            self.times_s.setdefault(name, []).append(at_s)
            self.memory_bytes.setdefault(name, []).append(resources.memory_bytes)

    def fits(self) -> dict[str, Fit]:
        """Of the second half of each process's samples: what only fills its caches grows in the first one."""
        return {
            name: fit(times_s[len(times_s) // 2 :], self.memory_bytes[name][len(times_s) // 2 :])
            for name, times_s in sorted(self.times_s.items())
        }

    def memory_mib(self, every: int) -> dict[str, list[int]]:
        """One in so many samples."""
        return {name: [value >> 20 for value in self.memory_bytes[name][::every]] for name in sorted(self.memory_bytes)}


def by_process(processes: Processes) -> dict[str, Resources]:
    """Now, of every process by role (or program) and pid."""
    found = {}
    for process in processes.all():
        try:
            found[f"{_title(process)} {process.pid}"] = resources_of(process)
        except psutil.Error:
            continue  # it has just ended
    return found


@dataclass(frozen=True)
class ClusterState:
    num_actors: int
    num_placement_groups: int
    num_tasks: dict[str, int]  # asyncio's, by event loop

    @classmethod
    def read(cls) -> "ClusterState":
        """Of the only cluster on this host. What processes hand over for metrics may be twenty seconds old."""
        ray.init(address="auto", namespace="serve", log_to_driver=False)
        try:
            return cls(
                len(list_actors(filters=[("state", "=", "ALIVE")])),
                len(list_placement_groups(filters=[("state", "=", "CREATED")])),
                _num_tasks(ray.nodes()),
            )
        finally:
            ray.shutdown()


def differences(before: dict[str, Resources], after: dict[str, Resources]) -> list[str]:
    """In words, what processes hold at rest now that they did not hold at rest before.

    Ray's own may come and go, and its workers that wait for work.
    """
    found = [f"{name} has ended" for name in before.keys() - after.keys() if _is_of_the_service(name)]
    found += [f"{name} is new" for name in after.keys() - before.keys() if _is_of_the_service(name)]
    for name in before.keys() & after.keys():
        then, now = before[name], after[name]
        for what, slack in (
            ("num_files", MAX_MORE_FILES),
            ("num_sockets", MAX_MORE_FILES),
            ("num_threads", MAX_MORE_THREADS),
        ):
            if getattr(now, what) > getattr(then, what) + slack:
                found.append(f"{name}: {what} {getattr(then, what)} → {getattr(now, what)}")
    return found


def cluster_differences(before: ClusterState, after: ClusterState) -> list[str]:
    found = []
    for what in ("num_actors", "num_placement_groups"):
        if getattr(before, what) != getattr(after, what):
            found.append(f"{what} {getattr(before, what)} → {getattr(after, what)}")
    for loop, number in after.num_tasks.items():
        if number > before.num_tasks.get(loop, 0) + MAX_MORE_TASKS:
            found.append(f"{loop}: asyncio tasks {before.num_tasks.get(loop, 0)} → {number}")
    return found


def _is_of_the_service(name: str) -> bool:
    return name.split()[0] in Role.__members__


def _title(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    return next((role.name for role in Role if command.startswith(role)), process.name())


def _num_tasks(nodes: Sequence[dict[str, object]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for node in nodes:
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "ray_serve_event_loop_tasks":
                    labels = sample.labels
                    role = labels.get("deployment") or labels["component"]
                    found[f"{role} {labels['actor_id'][:8]} {labels['loop_type']}"] = int(sample.value)
    return dict(found)
