"""`RayPipeline`: any number of stage actors gives the tokens of one, also when links between them are cut."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.util.placement_group import placement_group, remove_placement_group

from gptj_serve.config import HandoffKind, KVCacheConfig, PipelineConfig, StageConfig
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.errors import PipelineError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.serving.pipeline_deployment import stage_settings
from gptj_serve.serving.ray_pipeline import RayPipeline
from gptj_serve.steps import MicroBatch, Row, SampleSpec, StepOutput
from gptj_serve.types import EngineRequest, SamplingParams, Task, TokenEvent, Warpers
from tests.chaos import links

pytestmark = pytest.mark.serve

NUM_KV_BLOCKS = 40
BLOCK_SIZE = 8


@asynccontextmanager
async def engine_over_actors(checkpoint: Checkpoint, num_stages: int) -> AsyncIterator[tuple[LocalEngine, RayPipeline]]:
    config = PipelineConfig(
        num_stages=num_stages,
        stage=StageConfig(num_cpus=0.01, num_threads=1),
        kv_cache=KVCacheConfig(block_size=BLOCK_SIZE, num_tokens=NUM_KV_BLOCKS * BLOCK_SIZE),
    )
    group = placement_group([{"CPU": 0.01}] * (num_stages + 1))
    await group.ready()
    pipeline = RayPipeline(f"test-{num_stages}", config, group)
    try:
        await pipeline.start(stage_settings(config, checkpoint, checkpoint.config.vocab_size))
        limits = SchedulerLimits(num_stages, 32, 64, checkpoint.config.n_positions)
        blocks = KVBlocks(NUM_KV_BLOCKS, BLOCK_SIZE)
        scheduler = Scheduler(limits, blocks, checkpoint.config.eos_token_ids)
        async with LocalEngine(scheduler, pipeline) as engine:
            yield engine, pipeline
            scheduler.check_integrity()
            assert scheduler.num_preemptions > 0, "the pool was meant to be too small"
    finally:
        pipeline.close()
        remove_placement_group(group)


ROW = Row([5, 6, 7], 0, [0], samples=[SampleSpec()])


@asynccontextmanager
async def pipeline_of_two(
    checkpoint: Checkpoint, step_timeout_s: float, handoff: HandoffKind = "auto"
) -> AsyncIterator[RayPipeline]:
    config = PipelineConfig(
        num_stages=2,
        stage=StageConfig(num_cpus=0.01, num_threads=1),
        kv_cache=KVCacheConfig(block_size=BLOCK_SIZE, num_tokens=NUM_KV_BLOCKS * BLOCK_SIZE),
        step_timeout_s=step_timeout_s,
        handoff=handoff,
    )
    group = placement_group([{"CPU": 0.01}] * 3)
    await group.ready()
    pipeline = RayPipeline("test-faults", config, group)
    try:
        await pipeline.start(stage_settings(config, checkpoint, checkpoint.config.vocab_size))
        yield pipeline
    finally:
        pipeline.close()
        remove_placement_group(group)


async def noticed_and_recovered(pipeline: RayPipeline, *steps: asyncio.Task[StepOutput]) -> str:
    """What the pipeline says of the loss of a stage; then it is as before."""
    watch = asyncio.create_task(pipeline.watch())
    done, _ = await asyncio.wait([watch, *steps], return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(PipelineError) as raised:
        await done.pop()
    watch.cancel()
    await asyncio.gather(watch, *steps, return_exceptions=True)
    await pipeline.recover()
    return str(raised.value)


async def test_a_lost_stage_is_noticed_however_it_is_lost(cluster: None, demo: Path) -> None:
    """Not by `step_timeout_s`: that does not pass here. Then it is brought back, and answers as before."""
    async with pipeline_of_two(Checkpoint.open(demo), step_timeout_s=3600) as pipeline:
        sound = await pipeline.run(MicroBatch(0, [ROW]))
        for number, fault in enumerate(("killed while idle", "killed", "exits", "raises", "out of memory")):
            victim = pipeline._stages[number % 2]
            if fault.startswith("killed"):
                os.kill(victim.description["pid"], signal.SIGKILL)
            else:
                await victim.actor.__ray_call__.remote(break_next_step(fault))
            steps = [] if "idle" in fault else [asyncio.create_task(pipeline.run(MicroBatch(1, [ROW])))]
            told = await noticed_and_recovered(pipeline, *steps)
            assert "step_timeout_s" not in told
            assert (await pipeline.run(MicroBatch(0, [ROW]))).rows == sound.rows
        assert [stage.num_restarts for stage in pipeline._stages] == [2, 1]  # who raised is kept, with its weights


async def test_a_replacement_that_could_not_load_is_replaced_again(cluster: None, demo: Path, tmp_path: Path) -> None:
    """Its actor lives and answers, but has no weights."""
    copy = Path(shutil.copytree(demo, tmp_path / "copy"))
    async with pipeline_of_two(Checkpoint.open(copy), step_timeout_s=3600) as pipeline:
        sound = await pipeline.run(MicroBatch(0, [ROW]))
        os.kill(pipeline._stages[0].description["pid"], signal.SIGKILL)
        (copy / "model.safetensors").rename(tmp_path / "away")
        with pytest.raises(PipelineError, match="could not be brought back"):
            await pipeline.recover()
        (tmp_path / "away").rename(copy / "model.safetensors")
        await pipeline.recover()
        assert (await pipeline.run(MicroBatch(0, [ROW]))).rows == sound.rows
        assert [stage.num_restarts for stage in pipeline._stages] == [2, 0]


@pytest.mark.parametrize("kind", ["zmq", "distributed"])
async def test_another_handoff_can_be_asked_for(cluster: None, demo: Path, kind: HandoffKind) -> None:
    async with pipeline_of_two(Checkpoint.open(demo), step_timeout_s=3600) as pipeline:
        assert [status["handoff"] for status in pipeline.stage_statuses()] == [None, "shared_memory"]
        expected = await pipeline.run(MicroBatch(0, [ROW]))
    async with pipeline_of_two(Checkpoint.open(demo), step_timeout_s=3600, handoff=kind) as pipeline:
        assert [status["handoff"] for status in pipeline.stage_statuses()] == [None, kind]
        assert (await pipeline.run(MicroBatch(0, [ROW]))).rows == expected.rows
        os.kill(pipeline.stage_statuses()[0]["pid"], signal.SIGKILL)
        await noticed_and_recovered(pipeline, asyncio.create_task(pipeline.run(MicroBatch(1, [ROW]))))
        assert (await pipeline.run(MicroBatch(0, [ROW]))).rows == expected.rows


async def test_a_stage_that_hangs_is_noticed_by_the_step_timeout(cluster: None, demo: Path) -> None:
    async with pipeline_of_two(Checkpoint.open(demo), step_timeout_s=8.0) as pipeline:
        sound = await pipeline.run(MicroBatch(0, [ROW]))
        await pipeline._stages[1].actor.__ray_call__.remote(break_next_step("hangs"))
        step = asyncio.create_task(pipeline.run(MicroBatch(1, [ROW])))
        assert "microbatch 1 is not back after step_timeout_s=8.0" in await noticed_and_recovered(pipeline, step)
        assert (await pipeline.run(MicroBatch(0, [ROW]))).rows == sound.rows
        assert [stage.num_restarts for stage in pipeline._stages] == [0, 1]


def break_next_step(fault: str) -> Callable[[Any], None]:
    """For a stage's actor, to be called in its process."""

    def arm(stage: Any) -> None:
        import os
        import time

        import torch

        run = stage._runner.run

        def broken(*_: object) -> None:
            stage._runner.run = run
            if fault == "exits":
                os._exit(1)
            if fault == "hangs":
                time.sleep(3600)
            raise torch.OutOfMemoryError("out of memory") if fault == "out of memory" else ZeroDivisionError("a bug")

        stage._runner.run = broken

    return arm


async def generate_all(engine: LocalEngine, num_requests: int) -> list[list[int]]:
    async def generate(n: int) -> list[int]:
        prompt = [(7 * n + 13 * i) % 1000 + 1 for i in range(1 + 5 * n)]
        sampling = SamplingParams(max_new_tokens=40, warpers=Warpers(temperature=float(n % 2)), seed=n)
        request = EngineRequest(request_id=str(n), task=Task.GENERATE, prompt_token_ids=prompt, sampling=sampling)
        return [event.token_id async for event in engine.submit(request) if isinstance(event, TokenEvent)]

    return await asyncio.gather(*[generate(n) for n in range(num_requests)])


async def test_stages_as_actors_give_identical_tokens(cluster: None, demo: Path) -> None:
    checkpoint = Checkpoint.open(demo)
    answers = {}
    for num_stages in (1, 2, 3, 6):
        async with engine_over_actors(checkpoint, num_stages) as (engine, _):
            answers[num_stages] = await generate_all(engine, 16)
    assert all(len(tokens) > 0 for tokens in answers[1])
    assert answers[1] == answers[2] == answers[3] == answers[6]


async def test_a_cut_link_is_made_anew_between_the_same_stages(cluster: None, demo: Path) -> None:
    """Each kind of link, cut from outside; of hidden states' link only the stages can tell."""
    checkpoint = Checkpoint.open(demo)
    async with engine_over_actors(checkpoint, 2) as (engine, pipeline):
        undisturbed = await generate_all(engine, 16)
        pids = [status["pid"] for status in pipeline.stage_statuses()]
        for number, name in enumerate(("0-steps", "1-steps", "1-hidden", "results"), start=1):
            enough = engine.stats().num_tokens_generated + 50
            answers = asyncio.create_task(generate_all(engine, 16))
            while engine.stats().num_tokens_generated < enough:
                await asyncio.sleep(0.01)
            (link,) = [link for link in links.links_of([*pids, os.getpid()]) if link.name == name]
            assert links.cut(link)
            assert await answers == undisturbed
            assert engine.stats().num_recoveries == number
        assert [status["pid"] for status in pipeline.stage_statuses()] == pids
        assert [status["num_restarts"] for status in pipeline.stage_statuses()] == [0, 0]
