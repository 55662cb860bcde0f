"""The short form of `python -m tests.chaos`: each kind of fault once, under traffic of all tasks."""

import random
from pathlib import Path

import httpx
import pytest

from tests.chaos import harness
from tests.chaos.deployment import chaos_config
from tests.chaos.faults import FaultKind, Processes
from tests.chaos.repair import settle
from tests.chaos.report import leaks
from tests.chaos.traffic import Outcome, calls, undisturbed_answers
from tests.serving.service import ServeRun

pytestmark = [pytest.mark.serve, pytest.mark.faults]

PORT = 8013


@pytest.mark.timeout(300)
async def test_whatever_is_lost_no_answer_changes(tmp_path: Path) -> None:
    """Two pipelines and two ingresses, in a cluster of their own beside the other tests' service."""
    service = ServeRun(
        chaos_config(tmp_path, PORT), tmp_path / "output.log", PORT, RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S="1"
    )
    try:
        service.wait_until_ready()
        processes = Processes(service.process.pid)
        wanted = calls(random.Random(0), 12)
        async with httpx.AsyncClient(base_url=service.url, timeout=120) as client:
            expected = await undisturbed_answers(client, wanted)
        census = processes.census()
        before = processes.resources()
        plan = harness.Plan(
            list(FaultKind), len(FaultKind), interval_s=0.5, concurrency=4, undisturbed_s=2.0, is_one_at_a_time=True
        )
        report = await harness.run(service.url, processes, wanted, expected, plan)
        await settle(service.url, processes, census)
        assert [fault.kind for fault in report.faults] == list(FaultKind)
        assert report.unexcused() == []
        num_asked = len(report.records) - report.outcomes[Outcome.UNREACHABLE]
        assert report.outcomes[Outcome.EQUAL] > num_asked / 2
        assert leaks(before, processes.resources()) == []
    finally:
        service.interrupt()
