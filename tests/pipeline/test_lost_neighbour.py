"""A neighbour that is killed or hangs, whatever the handoff, and whatever it is at: an error soon, then all is well."""

import asyncio
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest

from gptj_serve.config import HandoffKind
from gptj_serve.errors import PipelineError
from gptj_serve.pipeline.step_links import StepLinks
from gptj_serve.steps import StepOutput
from tests.pipeline.neighbours import KINDS
from tests.pipeline.scripted_stages import StageHere, StageProcess, linked, outcome, step

SOON_S = 5.0
"""Nothing here waits for a time-out; the rest is for a busy machine."""

pytestmark = pytest.mark.parametrize("kind", KINDS)


async def run_steps(links: StepLinks) -> None:
    """Two at a time, small and large."""
    for first in range(0, 6, 2):
        pair = [step(n, 10 + n, num_tokens=1 + 300 * (n % 3)) for n in (first, first + 1)]
        assert await asyncio.gather(*map(links.run, pair)) == [outcome(n, 10 + n) for n in (first, first + 1)]


@pytest.mark.parametrize("victim", ["the one before", "the next one"])
@pytest.mark.parametrize("phase", ["idle", "while the first computes", "while the second computes"])
async def test_a_killed_neighbour_ends_the_steps_and_is_replaced(
    kind: HandoffKind, tmp_path: Path, victim: str, phase: str
) -> None:
    here = StageHere(1 if victim == "the one before" else 0)
    durations = {"idle": (0, 0), "while the first computes": (400, 0), "while the second computes": (0, 400)}[phase]
    for generation in range(2):
        directory = tmp_path / str(generation)
        directory.mkdir()
        with StageProcess(1 - here.index, kind) as other:
            stages = (other, here) if victim == "the one before" else (here, other)
            async with linked(stages, str(directory), kind) as links:
                await run_steps(links)
                steps = []
                if phase != "idle":
                    pair = (step(6, 1, durations_ms=durations), step(7, 2, num_tokens=600))
                    steps = [asyncio.create_task(links.run(one)) for one in pair]
                    await asyncio.sleep(0.1)
                other.signal(signal.SIGKILL)
                with pytest.raises(PipelineError):
                    await asyncio.wait_for(links.watch(), SOON_S)
                for one in steps:
                    with pytest.raises(PipelineError):
                        await asyncio.wait_for(one, SOON_S)
                assert here.loop is not None
                with pytest.raises(PipelineError):
                    await asyncio.wait_for(asyncio.wrap_future(here.loop.failure), SOON_S)
            await asyncio.wait_for(asyncio.to_thread(here.stop), SOON_S)


async def test_kills_at_any_moment(kind: HandoffKind) -> None:
    """Of either stage, in the midst of prompts and decode steps; answers before and after are exact."""
    rng = random.Random(kind)
    num_cut = 0
    for _ in range(8):
        victim = rng.randrange(2)
        here = StageHere(1 - victim)
        with tempfile.TemporaryDirectory() as directory, StageProcess(victim, kind) as other:
            stages = (other, here) if victim == 0 else (here, other)
            async with linked(stages, directory, kind) as links:
                microbatches = [step(n, n % 50, num_tokens=rng.choice([1, 1, 2000])) for n in range(400)]
                steps = [asyncio.create_task(links.run(one)) for one in microbatches]
                await asyncio.sleep(rng.uniform(0.0, 0.15))
                other.signal(signal.SIGKILL)
                answers = await asyncio.wait_for(asyncio.gather(*steps, return_exceptions=True), 2 * SOON_S)
            await asyncio.wait_for(asyncio.to_thread(here.stop), SOON_S)
        for n, answer in enumerate(answers):
            assert isinstance(answer, PipelineError) or answer == outcome(n, n % 50)
        num_cut += sum(isinstance(answer, PipelineError) for answer in answers)
    assert num_cut > 0


@pytest.mark.parametrize("at", ["a step", "nothing"])
async def test_a_stage_beside_one_that_hangs_can_be_stopped(kind: HandoffKind, tmp_path: Path, at: str) -> None:
    for index in range(2):
        here = StageHere(index)
        (tmp_path / str(index)).mkdir()
        with StageProcess(1 - index, kind) as other:
            stages = (here, other) if index == 0 else (other, here)
            async with linked(stages, str(tmp_path / str(index)), kind) as links:
                await run_steps(links)
                other.signal(signal.SIGSTOP)
                steps = []
                if at == "a step":  # more than the slots or buffers between them
                    steps = [asyncio.create_task(links.run(step(n, 1, num_tokens=50))) for n in range(6, 26)]
                    await asyncio.sleep(0.3)
                await asyncio.wait_for(asyncio.to_thread(here.stop), SOON_S)
                assert here.loop is not None
                assert here.loop.failure.result(timeout=0) is None
                for one in steps:
                    one.cancel()


async def test_steps_overlap(kind: HandoffKind, tmp_path: Path) -> None:
    """While the second stage is at one, the first is at the next: four steps of 50 + 50 ms take less than 400."""
    with StageProcess(1, kind) as other:
        here = StageHere(0)
        async with linked((here, other), str(tmp_path), kind) as links:
            await run_steps(links)
            spans: list[StepOutput] = []
            before = time.monotonic()
            pending = [links.run(step(n, n, durations_ms=(50, 50))) for n in range(6, 10)]
            spans += await asyncio.gather(*pending)
            assert spans == [outcome(n, n) for n in range(6, 10)]
            assert time.monotonic() - before < 0.4
        await asyncio.to_thread(here.stop)
