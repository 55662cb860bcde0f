"""What came of traffic under faults: outcomes, recovery times, throughput around the faults."""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.chaos.deployment import REPLAY_TIMEOUT_S
from tests.chaos.faults import CUTS_CONNECTIONS, Fault, FaultKind, Resources
from tests.chaos.traffic import Outcome, Record

IN_FLIGHT_S = 0.5

AROUND_S = range(-2, 10)
"""The seconds around a fault in which throughput is looked at."""

MEMORY_FACTOR, MEMORY_SLACK_BYTES = 1.25, 64 << 20
"""A process that has served for a while holds more than a new one, and allocators keep what they had."""

FILES_SLACK, THREADS_SLACK = 8, 8
"""Per process. Ray opens connections and starts threads when they are needed, and keeps them."""


@dataclass
class Report:
    """Times are those of `time.monotonic()`."""

    started_at: float
    undisturbed_s: float
    ended_at: float = 0.0
    records: list[Record] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    downtimes: list[tuple[float, float]] = field(default_factory=list)  # in which no pipeline was ready

    @property
    def outcomes(self) -> Counter[Outcome]:
        return Counter(record.outcome for record in self.records)

    @property
    def num_resumed(self) -> int:
        """Streams that were cut, taken up again, and equal to the undisturbed ones in the end."""
        return sum(record.outcome is Outcome.EQUAL and record.num_resumptions > 0 for record in self.records)

    def unexcused(self) -> list[Record]:
        """Calls that were not answered alike, without anything to blame.

        To blame is the loss of a process that clients are connected to, from its end until its successor was seen to
        answer; and of a refusal also that no pipeline was ready for longer than a request waits for one.
        """
        outages = [(fault.at, fault.repaired_at) for fault in self.faults if fault.kind in CUTS_CONNECTIONS]
        too_long = [(begin, end) for begin, end in self.downtimes if end - begin > REPLAY_TIMEOUT_S]

        def is_excused(record: Record) -> bool:
            match record.outcome:
                case Outcome.EQUAL:
                    return True
                case Outcome.BROKEN | Outcome.UNREACHABLE:
                    return _falls_into(record, outages)
                case Outcome.REFUSED:
                    return _falls_into(record, outages + too_long)
                case Outcome.CHANGED | Outcome.HANGING:
                    return False

        return [record for record in self.records if not is_excused(record)]

    def recovery_times(self, kind: FaultKind) -> list[float]:
        """Per fault of that kind: until the last of the streams that were flowing went on. Seconds."""
        times = []
        for fault in self.faults:
            gaps = [gap for record in self.records if (gap := _gap_at(record, fault.at)) is not None]
            if fault.kind is kind and gaps:
                times.append(max(gaps))
        return sorted(times)

    def undisturbed_events_per_s(self) -> float:
        """The median over the seconds before the first fault, without the first one."""
        counts = self._events_in_seconds(self.started_at, range(1, int(self.undisturbed_s)))
        return statistics.median(counts) if counts else math.nan

    def events_per_s_around(self, kind: FaultKind) -> dict[int, float]:
        """The mean over the faults of that kind, by the number of the second after the fault."""
        rows = [self._events_in_seconds(fault.at, AROUND_S) for fault in self.faults if fault.kind is kind]
        return {
            second: statistics.mean(column) for second, column in zip(AROUND_S, zip(*rows, strict=True), strict=True)
        }

    def _events_in_seconds(self, origin: float, seconds: range) -> list[int]:
        counts = Counter(math.floor(at - origin) for record in self.records for at in record.arrivals)
        return [counts[second] for second in seconds]

    def as_dict(self) -> dict[str, Any]:
        """Every figure, for a result file."""
        undisturbed = self.undisturbed_events_per_s()
        return {
            "num_calls": len(self.records),
            "duration_s": self.ended_at - self.started_at,
            "outcomes": {str(outcome): count for outcome, count in sorted(self.outcomes.items())},
            "num_resumed": self.num_resumed,
            "num_unexcused": len(self.unexcused()),
            "downtimes_s": sorted(end - begin for begin, end in self.downtimes),
            "num_faults": len(self.faults),
            "undisturbed_events_per_s": undisturbed,
            "kinds": {
                str(kind): {
                    "num_faults": sum(fault.kind is kind for fault in self.faults),
                    "recovery_s": _percentiles(self.recovery_times(kind)),
                    "outage_s": _percentiles(
                        sorted(fault.repaired_at - fault.at for fault in self.faults if fault.kind is kind)
                        if kind in CUTS_CONNECTIONS
                        else []
                    ),
                    "events_ratio_around": {
                        second: events / undisturbed for second, events in self.events_per_s_around(kind).items()
                    },
                }
                for kind in FaultKind
                if any(fault.kind is kind for fault in self.faults)
            },
        }

    def lines(self) -> list[str]:
        figures = self.as_dict()
        counts = ", ".join(f"{count} {outcome}" for outcome, count in figures["outcomes"].items())
        lines = [
            f"{len(self.records)} calls in {figures['duration_s']:.0f} s: {counts};"
            f" {self.num_resumed} of the equal ones were cut and resumed; {figures['num_unexcused']} unexcused",
            f"undisturbed: {figures['undisturbed_events_per_s']:.0f} events/s (median)",
        ]
        for kind, of_kind in figures["kinds"].items():
            line = f"{kind}: {of_kind['num_faults']} times"
            for name, what in (("recovery_s", "streams went on after"), ("outage_s", "new connections answered after")):
                if of_kind[name]:
                    line += f"; {what} {of_kind[name]['p50']:.2f} s (median), {of_kind[name]['p99']:.2f} s (p99)"
            lines.append(line)
            ratios = of_kind["events_ratio_around"].items()
            lines.append("  events/s: " + " ".join(f"{second:+d}s {ratio:.0%}" for second, ratio in ratios))
        return lines


def _falls_into(record: Record, spans: Sequence[tuple[float, float]]) -> bool:
    return any(record.started_at <= end and begin <= record.ended_at for begin, end in spans)


def leaks(before: dict[str, Resources], after: dict[str, Resources]) -> list[str]:
    """In words, what a role holds now and should not, per process; empty if all is as it was."""
    found = []
    for role, then in before.items():
        now = after[role]
        if now.num_processes != then.num_processes:
            found.append(f"{role}: {then.num_processes} → {now.num_processes} processes")
        limits = {
            "num_files": then.num_files + FILES_SLACK * then.num_processes,
            "num_sockets": then.num_sockets + FILES_SLACK * then.num_processes,
            "num_threads": then.num_threads + THREADS_SLACK * then.num_processes,
            "memory_bytes": int(then.memory_bytes * MEMORY_FACTOR) + MEMORY_SLACK_BYTES * then.num_processes,
        }
        for name, limit in limits.items():
            if getattr(now, name) > limit:
                found.append(f"{role}: {name} {getattr(then, name)} → {getattr(now, name)}, more than {limit}")
    return found


def resource_lines(before: dict[str, Resources], after: dict[str, Resources]) -> list[str]:
    return [
        f"{role}: "
        + ", ".join(
            f"{name.removeprefix('num_')} {value} → {getattr(after[role], name)}"
            if name != "memory_bytes"
            else f"memory {value >> 20} → {getattr(after[role], name) >> 20} MiB"
            for name, value in asdict(then).items()
        )
        for role, then in before.items()
    ]


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """Of sorted values; empty if there are none."""
    if not values:
        return {}
    p99 = values[min(len(values) - 1, int(0.99 * len(values)))]
    return {"num": len(values), "p50": statistics.median(values), "p99": p99, "max": values[-1]}


def _gap_at(record: Record, moment: float) -> float | None:
    """From `moment` to the end of the longest pause that a stream made about then; None if it was not flowing.

    What was on its way already still arrives, so the pause may begin a little later.
    """
    if not record.arrivals or record.arrivals[0] > moment or record.outcome is not Outcome.EQUAL:
        return None
    pauses = [
        pair for pair in itertools.pairwise(record.arrivals) if pair[1] > moment and pair[0] < moment + IN_FLIGHT_S
    ]
    return max(((end - begin, end - moment) for begin, end in pauses), default=(0.0, None))[1]
