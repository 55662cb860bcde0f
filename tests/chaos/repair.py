"""When a service is whole again, as its clients and the process table see it."""

import asyncio
import time
from typing import Any

import httpx
import psutil

from tests.chaos.faults import ROLES, Fault, FaultKind, Processes

PROBE_INTERVAL_S = 0.2

READINESS_INTERVAL_S = 1.0

NOTICING_S = 0.5
"""By then a pipeline knows that it was cut."""

REPAIR_TIMEOUT_S = 60.0


async def observe_repair(url: str, processes: Processes, census: dict[str, int], fault: Fault) -> None:
    """Set `fault.repaired_at` once the lost process has its successor and a new connection is answered.

    By then Serve has told everybody that the lost one is gone: it does so before it starts another.
    """
    role = ROLES[fault.kind]
    deadline = fault.at + REPAIR_TIMEOUT_S
    while True:
        pids = {process.pid for process in processes.of(role)}
        if fault.pid not in pids and len(pids) >= census[role.name] and await _is_answering(url):
            fault.repaired_at = time.monotonic()
            return
        assert time.monotonic() < deadline, f"not repaired after {REPAIR_TIMEOUT_S} s: {fault}"
        await asyncio.sleep(PROBE_INTERVAL_S)


async def observe_downtimes(
    url: str, downtimes: list[tuple[float, float]], interval_s: float = READINESS_INTERVAL_S
) -> None:
    """Until it is cancelled, add the spans in which `GET /ready` said each time that no pipeline is ready.

    Nobody's answer says nothing about the pipelines, and ends a span.
    """
    was_down = False
    while True:
        asked_at = time.monotonic()
        is_down = await _has_no_pipeline(url)
        if is_down and was_down:
            downtimes[-1] = (downtimes[-1][0], time.monotonic())
        elif is_down:
            downtimes.append((asked_at, time.monotonic()))
        was_down = is_down
        await asyncio.sleep(interval_s)


async def whole_again(url: str, processes: Processes, census: dict[str, int], fault: Fault) -> None:
    """Wait until the fault is noticed, its victim replaced (unless that lives on), and all pipelines are ready."""
    await asyncio.sleep(NOTICING_S)
    lives_on = fault.kind in (FaultKind.PAUSE_STAGE, FaultKind.CUT_LINK)
    deadline = fault.at + REPAIR_TIMEOUT_S
    while not lives_on and fault.pid in {process.pid for process in processes.of(ROLES[fault.kind])}:
        assert time.monotonic() < deadline, f"the victim was not replaced after {REPAIR_TIMEOUT_S} s: {fault}"
        await asyncio.sleep(PROBE_INTERVAL_S)
    await settle(url, processes, census, is_idle=False)


async def settle(
    url: str, processes: Processes, census: dict[str, int], *, is_idle: bool = True, timeout_s: float = REPAIR_TIMEOUT_S
) -> list[dict[str, Any]]:
    """Wait until all processes are back, all pipelines ready and, if `is_idle`, no request holds anything.

    Returns the pipelines' status.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        pipelines = await _pipelines(url)
        engines = [pipeline["engine"] for pipeline in pipelines]
        try:
            now = processes.census()
        except psutil.Error:
            now = {}
        is_ready = len(engines) == census["PIPELINE"] and all(pipeline["is_ready"] for pipeline in pipelines)
        is_at_rest = all(e["num_running"] == e["num_waiting"] == e["num_kv_blocks_used"] == 0 for e in engines)
        if is_ready and now == census and (is_at_rest or not is_idle):
            return pipelines
        assert time.monotonic() < deadline, f"not settled after {timeout_s} s: {now} for {census}, {engines}"
        await asyncio.sleep(PROBE_INTERVAL_S)


async def _has_no_pipeline(url: str) -> bool:
    async with httpx.AsyncClient(base_url=url, timeout=5) as client:
        try:
            return (await client.get("/ready")).json().get("is_ready") is False
        except (httpx.TransportError, ValueError):
            return False


async def _is_answering(url: str) -> bool:
    async with httpx.AsyncClient(base_url=url, timeout=5) as client:
        try:
            return (await client.get("/health")).status_code == 200
        except httpx.TransportError:
            return False


async def _pipelines(url: str) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        try:
            response = await client.get("/status")
            pipelines: list[dict[str, Any]] = response.json()["pipelines"] if response.status_code == 200 else []
        except (httpx.TransportError, ValueError):
            pipelines = []
    return pipelines
