"""Traffic and faults at the same time, and what came of both."""

import asyncio
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tests.chaos.faults import CUTS_CONNECTIONS, Fault, FaultKind, Processes
from tests.chaos.traffic import Call, Outcome, Record, is_same, perform

CALL_TIMEOUT_S = 90.0
"""Longer than any request may wait for a new replica: what takes longer hangs."""

CUT_MARGIN_S = 3.0
"""A connection may end so long after the process was killed that held it."""

IN_FLIGHT_S = 0.5

SETTLING_S = 60.0


@dataclass
class Report:
    records: list[Record] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    duration_s: float = 0.0

    @property
    def outcomes(self) -> Counter[Outcome]:
        return Counter(record.outcome for record in self.records)

    def unexcused(self) -> list[Record]:
        """Calls that neither were answered alike nor ended in one clear error, without a cut connection to blame."""
        cuts = [fault.at for fault in self.faults if fault.kind in CUTS_CONNECTIONS]

        def is_excused(record: Record) -> bool:
            if record.outcome in (Outcome.EQUAL, Outcome.REFUSED):
                return True
            was_cut = any(record.started_at - CUT_MARGIN_S <= at <= record.ended_at for at in cuts)
            return record.outcome is Outcome.BROKEN and was_cut

        return [record for record in self.records if not is_excused(record)]

    def recovery_times(self, kind: FaultKind) -> list[float]:
        """Per fault of that kind: until the last of the streams that were flowing went on. Seconds."""
        times = []
        for fault in self.faults:
            gaps = [gap for record in self.records if (gap := _gap_at(record, fault.at)) is not None]
            if fault.kind is kind and gaps:
                times.append(max(gaps))
        return times

    def lines(self) -> list[str]:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        lines = [f"{len(self.records)} calls in {self.duration_s:.0f} s: {counts}"]
        for kind in FaultKind:
            number = sum(fault.kind is kind for fault in self.faults)
            if number:
                times = sorted(self.recovery_times(kind))
                line = f"{kind}: {number} times"
                if times:
                    p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
                    line += f"; streams went on after {statistics.median(times):.2f} s (median), {p99:.2f} s (p99)"
                lines.append(line)
        return lines


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


async def run(
    url: str,
    processes: Processes,
    wanted: Sequence[Call],
    expected: Sequence[Any],
    *,
    kinds: Sequence[FaultKind],
    num_faults: int,
    interval_s: float,
    concurrency: int = 12,
    seed: int = 0,
) -> Report:
    """Call at random from `wanted`, `concurrency` at a time, until so many faults have happened, and let all end."""
    report = Report()
    rng = random.Random(seed)
    is_over = asyncio.Event()
    started_at = time.monotonic()

    async def worker(number: int) -> None:
        own = random.Random(seed * 1000 + number)
        while not is_over.is_set():
            index = own.randrange(len(wanted))
            # A connection of its own for each call, as from many clients: a proxy that dies takes no other call along.
            async with httpx.AsyncClient(base_url=url, timeout=CALL_TIMEOUT_S) as client:
                record = Record(wanted[index], time.monotonic())
                report.records.append(record)
                answer = await perform(client, wanted[index], record)
            if answer is not None:
                record.outcome = Outcome.EQUAL if is_same(answer, expected[index]) else Outcome.CHANGED
                if record.outcome is Outcome.CHANGED:
                    record.detail = f"{answer} instead of {expected[index]}"
            elif record.outcome is not Outcome.EQUAL:
                await asyncio.sleep(0.2)

    workers = [asyncio.create_task(worker(number)) for number in range(concurrency)]
    while len(report.faults) < num_faults:
        await asyncio.sleep(rng.expovariate(1 / interval_s))
        fault = await processes.commit(rng.choice(kinds), rng)
        if fault is not None:
            report.faults.append(fault)
    is_over.set()
    await asyncio.gather(*workers)
    report.duration_s = time.monotonic() - started_at
    return report


async def settle(url: str, processes: Processes, census: dict[str, int]) -> list[dict[str, Any]]:
    """Wait until all processes are back and no request holds anything; returns the pipelines' status."""
    deadline = time.monotonic() + SETTLING_S
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        while True:
            try:
                response = await client.get("/status")
                pipelines = response.json()["pipelines"] if response.status_code == 200 else []
            except (httpx.TransportError, ValueError):
                pipelines = []
            engines = [pipeline["engine"] for pipeline in pipelines]
            is_idle = all(e["num_running"] == e["num_waiting"] == e["num_kv_blocks_used"] == 0 for e in engines)
            try:
                now = processes.census()
            except psutil.Error:
                now = {}
            if engines and len(engines) == census["PIPELINE"] and is_idle and now == census:
                return pipelines
            assert time.monotonic() < deadline, f"not at rest after {SETTLING_S} s: {now}, {engines}"
            await asyncio.sleep(0.5)
