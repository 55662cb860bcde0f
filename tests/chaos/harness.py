"""Traffic and faults at the same time."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.chaos.faults import CUTS_CONNECTIONS, FaultKind, Processes
from tests.chaos.repair import observe_downtimes, observe_repair, whole_again
from tests.chaos.report import Report
from tests.chaos.traffic import Call, Outcome, Record, is_same, perform

CALL_TIMEOUT_S = 90.0
"""Longer than `REPLAY_TIMEOUT_S`, so than any request may wait for a new replica: what takes longer hangs."""

PAUSE_S = 0.2
"""After a call that came to nothing."""

UNREACHABLE_PAUSE_S = 1.0
"""After a connection that was refused: figures are to be about answers, not about how often one can knock."""


@dataclass(frozen=True)
class Plan:
    """What is done to a service. `interval_s` is the mean time between faults."""

    kinds: Sequence[FaultKind]
    num_faults: int
    interval_s: float
    concurrency: int = 12
    seed: int = 0
    undisturbed_s: float = 10.0  # of traffic before the first fault, to compare with, and after the last
    is_one_at_a_time: bool = False  # the next fault waits until the service is whole


async def run(url: str, processes: Processes, wanted: Sequence[Call], expected: Sequence[Any], plan: Plan) -> Report:
    """Call at random from `wanted` until all the faults have happened, and let all calls end.

    The first faults go through `kinds` in order, the others are drawn at random.
    """
    report = Report(started_at=time.monotonic(), undisturbed_s=plan.undisturbed_s)
    rng = random.Random(plan.seed)
    census = processes.census()
    is_over = asyncio.Event()

    async def worker(number: int) -> None:
        own = random.Random(plan.seed * 1000 + number)
        while not is_over.is_set():
            index = own.randrange(len(wanted))
            record = await call_once(url, wanted[index], expected[index], report.records)
            if record.outcome is Outcome.UNREACHABLE:
                await asyncio.sleep(UNREACHABLE_PAUSE_S)
            elif record.outcome is not Outcome.EQUAL:
                await asyncio.sleep(PAUSE_S)

    async with asyncio.TaskGroup() as tasks:
        downtimes = tasks.create_task(observe_downtimes(url, report.downtimes))
        for number in range(plan.concurrency):
            tasks.create_task(worker(number))
        await asyncio.sleep(plan.undisturbed_s)
        while len(report.faults) < plan.num_faults:
            await asyncio.sleep(rng.expovariate(1 / plan.interval_s))
            number = len(report.faults)
            kind = plan.kinds[number] if number < len(plan.kinds) else rng.choice(plan.kinds)
            fault = await processes.commit(kind, rng)
            if fault is None:
                continue
            report.faults.append(fault)
            if fault.kind in CUTS_CONNECTIONS:
                tasks.create_task(observe_repair(url, processes, census, fault))
            if plan.is_one_at_a_time:
                await whole_again(url, processes, census, fault)
        await asyncio.sleep(plan.undisturbed_s)
        is_over.set()
        downtimes.cancel()
    report.ended_at = time.monotonic()
    return report


async def call_once(url: str, call: Call, expected: Any, records: list[Record]) -> Record:
    """Its record, which is among `records` as soon as it begins, says whether the answer was the expected one."""
    # A connection of its own for each call, as from many clients: a proxy that dies takes no other call along.
    async with httpx.AsyncClient(base_url=url, timeout=CALL_TIMEOUT_S) as client:
        record = Record(call, time.monotonic())
        records.append(record)
        answer = await perform(client, call, record)
    if answer is not None:
        record.outcome = Outcome.EQUAL if is_same(answer, expected) else Outcome.CHANGED
        if record.outcome is Outcome.CHANGED:
            record.detail = f"{answer} instead of {expected}"
    return record
