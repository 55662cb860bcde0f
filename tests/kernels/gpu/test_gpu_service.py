"""An engine over a stage with the real kernels, interpreted, and their sampler, on a device that is late."""

import asyncio
from dataclasses import replace

import pytest

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.loading_progress import silent
from gptj_serve.pipeline.gpu.cuda_device import CUDADevice
from gptj_serve.pipeline.gpu.device import Device
from gptj_serve.pipeline.gpu.loading import prepare_on_gpu
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.stage_runner import StageRunner
from gptj_serve.types import EngineRequest, SamplingParams, Task, TokenEvent, Warpers
from tests.pipeline.fake_device import FakeDevice
from tests.pipeline.gpu_runners import BLOCK_SIZE, specs_of, torch_runners

MAX_SEQUENCES, MAX_TOKENS, NUM_BLOCKS, N_POSITIONS = 3, 16, 24, 32


@pytest.fixture(scope="module")
def checkpoint(tiny_gptj) -> Checkpoint:
    return Checkpoint.open(tiny_gptj(n_layer=2, n_positions=N_POSITIONS))


async def tokens_of(runners: list[StageRunner], *, ahead: bool) -> list[list[int]]:
    limits = SchedulerLimits(len(runners), MAX_SEQUENCES, MAX_TOKENS, N_POSITIONS, schedules_ahead=ahead)
    pipeline = InProcessPipeline(runners)
    warpers = [Warpers(), Warpers(temperature=1.3, top_p=0.8), Warpers(temperature=0.9), Warpers()]
    requests = [
        EngineRequest(
            request_id=str(i),
            task=Task.GENERATE,
            prompt_token_ids=[(7 * i + 3 * n) % 90 + 1 for n in range(5 * i + 1)],
            sampling=SamplingParams(max_new_tokens=6, warpers=warpers[i], seed=i),
        )
        for i in range(4)
    ]
    async with LocalEngine(Scheduler(limits, KVBlocks(NUM_BLOCKS, BLOCK_SIZE), frozenset()), pipeline) as engine:

        async def one(request: EngineRequest) -> list[int]:
            return [e.token_id async for e in engine.submit(request) if isinstance(e, TokenEvent)]

        tokens = await asyncio.gather(*map(one, requests))
        assert (engine.stats().num_rows_ahead > 0) == ahead
    pipeline.close()
    return tokens


@pytest.mark.parametrize("num_stages", [1, 2])
async def test_tokens_are_those_of_pytorchs_kernels(checkpoint: Checkpoint, num_stages: int, device) -> None:
    limits = {"num_kv_blocks": NUM_BLOCKS, "max_num_sequences": MAX_SEQUENCES, "max_microbatch_tokens": MAX_TOKENS}
    expected = await tokens_of(torch_runners(checkpoint, **limits), ahead=False)
    assert [len(tokens) for tokens in expected] == [6] * 4
    where: Device = CUDADevice(device) if device.type == "cuda" else FakeDevice()
    runners: list[StageRunner] = []
    for spec in specs_of(checkpoint, num_stages, **limits):
        own = replace(spec, device=device, kernels="auto")
        runners.append(prepare_on_gpu(where, checkpoint, own, None, silent)(NUM_BLOCKS))
    assert [runner.kernels for runner in runners] == ["triton-float32"] * num_stages
    assert await tokens_of(runners, ahead=num_stages == 1) == expected
