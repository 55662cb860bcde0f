"""`RayPipeline`: any number of stage actors gives the tokens of one, also when links between them are cut."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from ray.util.placement_group import placement_group, remove_placement_group

from gptj_serve.config import KVCacheConfig, PipelineConfig, StageConfig
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.serving.pipeline_deployment import stage_settings
from gptj_serve.serving.ray_pipeline import RayPipeline
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
