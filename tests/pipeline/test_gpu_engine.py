"""The whole engine over stages on a device that is late: in one process with a stream for each, and linked as in the
service."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.errors import PipelineError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.steps import MicroBatch, Row, SampleSpec
from gptj_serve.types import EngineRequest, SamplingParams, Task, TokenEvent, Warpers
from tests.pipeline.fake_device import FakeDevice
from tests.pipeline.gpu_runners import BLOCK_SIZE, MAX_ROWS, MAX_TOKENS, gpu_runners, torch_runners
from tests.pipeline.linked import LinkedPipeline

N_POSITIONS = 96
PLENTY, SCARCE = 64, N_POSITIONS // BLOCK_SIZE + 2
MAX_NEW_TOKENS = 10


@pytest.fixture(scope="module")
def checkpoint(tiny_gptj) -> Checkpoint:
    return Checkpoint.open(tiny_gptj(n_layer=2))


@pytest.fixture(scope="module")
def requests() -> list[EngineRequest]:
    """Some are greedy, which the device can do, and some drawn, which it can't."""
    rng = random.Random(5)
    return [
        EngineRequest(
            request_id=str(i),
            task=Task.GENERATE,
            prompt_token_ids=[rng.randrange(1, 96) for _ in range(rng.choice([1, 3, 20, 60]))],
            sampling=SamplingParams(
                max_new_tokens=MAX_NEW_TOKENS, warpers=Warpers(temperature=1.2 if i % 4 == 3 else 0.0), seed=i
            ),
        )
        for i in range(12)
    ]


@asynccontextmanager
async def serving(
    pipeline: InProcessPipeline | LinkedPipeline, num_stages: int, num_kv_blocks: int, *, ahead: bool = False
) -> AsyncGenerator[LocalEngine]:
    limits = SchedulerLimits(num_stages, MAX_ROWS, MAX_TOKENS, N_POSITIONS, schedules_ahead=ahead)
    scheduler = Scheduler(limits, KVBlocks(num_kv_blocks, BLOCK_SIZE), frozenset())
    async with LocalEngine(scheduler, pipeline) as engine:
        yield engine
        scheduler.check_integrity()


async def tokens_of(engine: LocalEngine, requests: list[EngineRequest]) -> list[list[int]]:
    async def one(request: EngineRequest) -> list[int]:
        events = [event async for event in engine.submit(request)]
        assert all(isinstance(event, TokenEvent) for event in events), events
        return [event.token_id for event in events]

    return await asyncio.gather(*map(one, requests))


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint, requests: list[EngineRequest]) -> list[list[int]]:
    async def run() -> list[list[int]]:
        pipeline = InProcessPipeline(torch_runners(checkpoint, num_kv_blocks=PLENTY))
        async with serving(pipeline, 1, PLENTY) as engine:
            return await tokens_of(engine, requests)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("num_stages", "num_kv_blocks", "ahead", "seed"),
    [
        (1, PLENTY, False, None), (1, PLENTY, True, None), (1, PLENTY, True, 1), (1, SCARCE, True, 2),
        (2, PLENTY, False, None), (2, SCARCE, False, 3),
    ],
)  # fmt: skip
async def test_tokens_are_those_of_pytorchs_kernels(
    checkpoint: Checkpoint, requests, expected, num_stages: int, num_kv_blocks: int, ahead: bool, seed: int | None
):
    device = FakeDevice(None if seed is None else random.Random(seed))
    runners = gpu_runners(checkpoint, device, num_stages, num_kv_blocks=num_kv_blocks)
    pipeline = InProcessPipeline(runners)
    async with serving(pipeline, num_stages, num_kv_blocks, ahead=ahead) as engine:
        assert await tokens_of(engine, requests) == expected
        stats = engine.stats().as_dict()
        assert (stats["num_rows_ahead"] > 0) == ahead
        assert (stats["num_preemptions"] > 0) == (num_kv_blocks == SCARCE)
    statuses = pipeline.stage_statuses()
    pipeline.close()
    for status in statuses:
        assert status["kernels"] == "reference"
        assert len(status["steps"]) > 10
        assert all(step["duration_s"] >= 0 for step in status["steps"])


@pytest.mark.parametrize("linked", ["ipc"], indirect=True)
@pytest.mark.parametrize("num_stages", [1, 2])
async def test_linked_stages_send_results_from_a_thread_of_their_own(
    checkpoint: Checkpoint, requests, expected, num_stages: int, linked: Callable[..., LinkedPipeline]
):
    pipeline = linked(gpu_runners(checkpoint, FakeDevice(), num_stages, num_kv_blocks=PLENTY))
    pipeline.connect()
    try:
        async with serving(pipeline, num_stages, PLENTY, ahead=num_stages == 1) as engine:
            assert await tokens_of(engine, requests) == expected
    finally:
        pipeline.close()


async def test_after_a_step_that_is_refused_the_pipeline_recovers(checkpoint: Checkpoint):
    pipeline = InProcessPipeline(gpu_runners(checkpoint, FakeDevice(), 2))
    with pytest.raises(PipelineError, match=r"microbatch 0 failed: IndexError.*index out of range"):
        await pipeline.run(MicroBatch(0, [Row([5000], 0, [0])]))
    await pipeline.recover()
    output = await pipeline.run(MicroBatch(7, [Row([5], 0, [0], samples=[SampleSpec()])]))
    assert output.rows[0] is not None
    assert len(output.rows[0].tokens) == 1
    pipeline.close()


async def test_a_failure_on_any_stages_device_ends_the_step(checkpoint: Checkpoint):
    device = FakeDevice()
    pipeline = InProcessPipeline(gpu_runners(checkpoint, device, 2))

    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    device.streams[0].launch(fail)  # of the first stage
    with pytest.raises(PipelineError, match="an illegal memory access"):
        await pipeline.run(MicroBatch(0, [Row([5], 0, [0], samples=[SampleSpec()])]))
    pipeline.close()


@pytest.mark.parametrize("linked", ["ipc"], indirect=True)
async def test_a_stage_whose_device_does_no_more_work_is_lost(
    checkpoint: Checkpoint, linked: Callable[..., LinkedPipeline]
):
    device = FakeDevice()
    (runner,) = gpu_runners(checkpoint, device)
    pipeline = linked([runner])
    pipeline.connect()

    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    device.streams[0].launch(fail)
    step = asyncio.create_task(pipeline.run(MicroBatch(0, [Row([5], 0, [0], samples=[SampleSpec()])])))
    with pytest.raises(PipelineError, match="an illegal memory access"):
        await pipeline.watch()
    with pytest.raises(PipelineError, match="no more work for this process: an illegal memory access"):
        await asyncio.to_thread(pipeline.close)
    assert pipeline.loops[0].failure.done()
    with pytest.raises(PipelineError):
        await step


@pytest.mark.parametrize("linked", ["ipc"], indirect=True)
async def test_a_stage_that_refused_a_step_is_not(checkpoint: Checkpoint, linked: Callable[..., LinkedPipeline]):
    pipeline = linked(gpu_runners(checkpoint, FakeDevice()))
    pipeline.connect()
    step = asyncio.create_task(pipeline.run(MicroBatch(0, [Row([5000], 0, [0])])))
    with pytest.raises(PipelineError, match="index out of range"):
        await pipeline.watch()
    await pipeline.recover()
    with pytest.raises(PipelineError):
        await step
    output = await pipeline.run(MicroBatch(1, [Row([5], 0, [0], samples=[SampleSpec()])]))
    assert output.rows[0] is not None
    assert len(output.rows[0].tokens) == 1
    await asyncio.to_thread(pipeline.close)
