"""A service that grows under a burst, shrinks under a trickle, sleeps and wakes; no answer changes."""

import asyncio
import random
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.chaos.traffic import Call, Record, calls, is_same, perform, undisturbed_answers
from tests.serving.service import ROOT, ServeRun, eventually

pytestmark = [pytest.mark.serve, pytest.mark.scaling, pytest.mark.timeout(200)]

PORT = 8014
MAX_PIPELINES = 3
DOWNSCALE_DELAY_S, SCALE_TO_ZERO_DELAY_S = 5.0, 10.0
POLL_S = 0.25
NUM_BURSTS = 8  # of all calls at once
NUM_CALLS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's, for this service alone."""
    return Path(shutil.copytree(ROOT / "gptj_serve" / "demo", tmp_path_factory.mktemp("checkpoint") / "demo"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[ServeRun]:
    """Pipelines with small shares of a CPU, four sequences at a time each, so that requests have to wait."""
    directory = tmp_path_factory.mktemp("scaling")
    config = yaml.safe_load((ROOT / "deployments" / "gptj.yaml").read_text())
    config["http_options"]["port"] = PORT
    args = config["applications"][0]["args"]
    args |= {"checkpoint": str(checkpoint), "model_name": "gptj-demo"}
    args["pipeline"] |= {"engine_num_cpus": 0.05, "scheduler": {"max_num_sequences": 4}}
    args["pipeline"]["stage"]["num_cpus"] = 0.1
    args["ingress"] = {"num_cpus": 0.05}
    args["autoscaling"] = {
        "min_pipelines": 0,
        "max_pipelines": MAX_PIPELINES,
        "target_drain_s": 2.0,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": DOWNSCALE_DELAY_S,
        "scale_to_zero_delay_s": SCALE_TO_ZERO_DELAY_S,
    }
    (directory / "scaling.yaml").write_text(yaml.safe_dump(config))
    run = ServeRun(directory / "scaling.yaml", directory / "output.log", PORT)
    try:
        yield run.wait_until_ready()
    finally:
        run.interrupt()


@pytest.fixture(scope="module")
def wanted() -> list[Call]:
    return calls(random.Random(3), NUM_CALLS)


@pytest.fixture(scope="module")
def expected(service: ServeRun, wanted: list[Call]) -> list[Any]:
    """Of one pipeline, where none of them has to wait."""

    async def ask() -> list[Any]:
        async with httpx.AsyncClient(base_url=service.url, timeout=120) as client:
            return await undisturbed_answers(client, wanted, concurrency=1)

    return asyncio.run(ask())


class Watch:
    """Asks whether the service is ready, again and again: when there were how many pipelines."""

    def __init__(self) -> None:
        self.not_ready: list[float] = []
        self.begin()

    def begin(self) -> None:
        """From here on times are counted."""
        self.began_at = time.monotonic()
        self.numbers: list[tuple[float, int]] = []  # seconds and how many are ready, at each change
        self.asked_s: float | None = None  # when the first new one was on its way

    async def run(self, client: httpx.AsyncClient) -> None:
        while True:
            response = await client.get("/ready")
            elapsed_s = time.monotonic() - self.began_at
            if response.status_code != 200:
                self.not_ready.append(elapsed_s)
            number = sum(pipeline["is_ready"] for pipeline in response.json()["pipelines"])
            if not self.numbers or self.numbers[-1][1] != number:
                self.numbers.append((elapsed_s, number))
            changes = response.json()["scaling"]["changes"]
            if self.asked_s is None and changes is not None and changes["num_starting"] > 0:
                self.asked_s = elapsed_s
            await asyncio.sleep(POLL_S)

    @property
    def number(self) -> int | None:
        return self.numbers[-1][1] if self.numbers else None

    async def until(self, is_so: Callable[[int | None], bool], timeout_s: float) -> float:
        """Seconds from the watch's beginning to then."""
        async with asyncio.timeout(timeout_s):
            while not is_so(self.number):
                await asyncio.sleep(POLL_S)
        return self.numbers[-1][0]


@asynccontextmanager
async def watching(client: httpx.AsyncClient) -> AsyncIterator[Watch]:
    watch = Watch()
    task = asyncio.create_task(watch.run(client))
    try:
        yield watch
        if task.done():
            task.result()
    finally:
        task.cancel()


@pytest.fixture
async def http(service: ServeRun) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=service.url, timeout=120, limits=limits) as client:
        yield client


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a line that pytest shows."""

    def write(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{line}\n")

    return write


async def wrong_answer(client: httpx.AsyncClient, call: Call, expected: Any) -> str:
    """What is wrong with it, if anything."""
    record = Record(call, time.monotonic())
    answer = await perform(client, call, record)
    if answer is None:
        return f"{call}: {record.outcome}: {record.detail}"
    return "" if is_same(answer, expected) else f"{call}: {answer} instead of {expected}"


async def test_a_burst_brings_more_pipelines_and_a_trickle_ends_them(
    http: httpx.AsyncClient, wanted: list[Call], expected: list[Any], tell: Callable[[str], None]
) -> None:
    async with watching(http) as watch:
        await watch.until(lambda number: number == 1, 5)
        watch.begin()
        burst = [
            asyncio.create_task(wrong_answer(http, call, answer))
            for _ in range(NUM_BURSTS)
            for call, answer in zip(wanted, expected, strict=True)
        ]
        up_s = await watch.until(lambda number: number == MAX_PIPELINES, 60)
        wrong = [await task for task in burst]
        burst_s, asked_s = time.monotonic() - watch.began_at, watch.asked_s
        watch.begin()

        async def trickle() -> None:
            """Always one request, so that some are under way whenever a pipeline ends."""
            while watch.number != 1:
                index = len(wrong) % NUM_CALLS
                wrong.append(await wrong_answer(http, wanted[index], expected[index]))

        await asyncio.gather(trickle(), down := asyncio.create_task(watch.until(lambda number: number == 1, 60)))
    assert [line for line in wrong if line] == []
    assert watch.not_ready == []
    assert asked_s is not None, "new pipelines came without having been started"
    tell(
        f"burst of {len(burst)}: {MAX_PIPELINES - 1} more pipelines asked for after {asked_s:.1f} s, ready after "
        f"{up_s:.1f} s, all answered after {burst_s:.1f} s; "
        f"then to 1 in {down.result():.1f} s (delay {DOWNSCALE_DELAY_S:g} s), {len(wrong) - len(burst)} more"
    )


async def test_an_idle_service_sleeps_and_the_next_requests_wake_it(
    http: httpx.AsyncClient, wanted: list[Call], expected: list[Any], tell: Callable[[str], None]
) -> None:
    async with watching(http) as watch:
        asleep_s = await watch.until(lambda number: number == 0, 90)
        await asyncio.sleep(2)  # nothing but a request of a task wakes it
        assert watch.number == 0

        async def is_quiet() -> bool:
            """the last pipeline is gone"""
            status = (await http.get("/status")).json()
            assert (status["pipelines"], status["problems"]) == ([], [])
            assert (status["scaling"]["min_pipelines"], status["scaling"]["max_pipelines"]) == (0, MAX_PIPELINES)
            return status["scaling"]["changes"] == {"num_starting": 0, "num_stopping": 0}

        await eventually(is_quiet)
        assert (await http.get("/health")).json() == {"status": "ok"}
        watch.begin()
        waking = asyncio.gather(*map(wrong_answer, [http] * NUM_CALLS, wanted, expected))
        late = await http.post("/generate", json={"inputs": "Hello"}, headers={"X-Request-Timeout": "1"})
        assert late.status_code == 504

        async def is_starting() -> bool:
            """the status tells of the pipeline to come"""
            return (await http.get("/status")).json()["scaling"]["changes"]["num_starting"] == 1

        await eventually(is_starting)
        wrong = await waking
        answered_s = time.monotonic() - watch.began_at
        assert [line for line in wrong if line] == []
        awake_s = next(elapsed_s for elapsed_s, number in watch.numbers if number > 0)
    assert watch.not_ready == []
    tell(
        f"asleep after {asleep_s:.1f} s (delay {SCALE_TO_ZERO_DELAY_S:g} s); woken by {NUM_CALLS} requests: one was "
        f"ready after {awake_s:.1f} s, all were answered after {answered_s:.1f} s"
    )


async def test_a_pipeline_that_can_not_start_is_a_problem_until_it_can(
    http: httpx.AsyncClient, checkpoint: Path, wanted: list[Call], expected: list[Any]
) -> None:
    async with watching(http) as watch:
        await watch.until(lambda number: number == 0, 90)
        assert watch.not_ready == []
    config, elsewhere = checkpoint / "config.json", checkpoint / "config.json.away"
    config.rename(elsewhere)
    try:
        late = await http.post("/generate", json={"inputs": "Hello"}, headers={"X-Request-Timeout": "1"})
        assert late.status_code == 504

        async def is_told() -> bool:
            """none is ready, since the one that was asked for can't start"""
            return (await http.get("/ready")).status_code == 503

        await eventually(is_told, 100)
        (problem,) = (await http.get("/status")).json()["problems"]
        assert problem.startswith("no pipeline starts: ")
        assert str(config) in problem
    finally:
        elsewhere.rename(config)
    assert await wrong_answer(http, wanted[0], expected[0]) == ""
    assert (await http.get("/ready")).status_code == 200
