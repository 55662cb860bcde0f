"""The demo checkpoint on the device and on the CPU in fp32: the same greedy tokens, and near ones in half precision."""

import asyncio
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch

from benchmarks.gpu.random_stages import random_prompts
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.types import EngineRequest, SamplingParams, Task, TokenEvent

NUM_TOP = 5
NUM_KV_BLOCKS = 1024

Chosen = list[TokenEvent]


def generate(runner: StageRunner, prompts: Sequence[list[int]], num_new: int) -> list[Chosen]:
    async def run() -> list[Chosen]:
        pipeline = InProcessPipeline([runner])
        limits = SchedulerLimits(1, 64, 512, runner.stage.config.n_positions)
        blocks = KVBlocks(NUM_KV_BLOCKS, 16)
        async with LocalEngine(Scheduler(limits, blocks, frozenset()), pipeline) as engine:

            async def one(index: int, prompt: list[int]) -> Chosen:
                params = SamplingParams(max_new_tokens=num_new, ignore_eos=True, num_top_logprobs=NUM_TOP)
                request = EngineRequest(
                    request_id=str(index), task=Task.GENERATE, prompt_token_ids=prompt, sampling=params
                )
                return [event async for event in engine.submit(request) if isinstance(event, TokenEvent)]

            chosen = await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))
        pipeline.close()
        return chosen

    return asyncio.run(run())


def compare(expected: Sequence[Chosen], found: Sequence[Chosen]) -> tuple[int, int, int]:
    """(sequences that are the same to their end, those that are not, and of these those where at the first difference
    each token is among the other's best)."""
    same = different = near = 0
    for theirs, ours in zip(expected, found, strict=True):
        pairs = [(a, b) for a, b in zip(theirs, ours, strict=True) if a.token_id != b.token_id]
        if not pairs:
            same += 1
            continue
        different += 1
        a, b = pairs[0]
        near += all(x.token_id in [token_id for token_id, _ in y.top_logprobs] for x, y in ((a, b), (b, a)))
    return same, different, near


def demo(device: torch.device, num_prompts: int = 32, num_new: int = 64) -> dict[str, float]:
    checkpoint = Checkpoint.open(Path(str(files("gptj_serve") / "demo")))
    config = checkpoint.config
    prompts = list(random_prompts(num_prompts, 24, config.vocab_size))

    def runner(where: torch.device, dtype: torch.dtype) -> StageRunner:
        span = range(config.n_layer)
        return StageRunner.load(checkpoint, StageSpec(span, NUM_KV_BLOCKS, 16, dtype, where, config.vocab_size))

    expected = generate(runner(torch.device("cpu"), torch.float32), prompts, num_new)
    figures: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = runner(device, dtype)
        same, different, near = compare(expected, generate(made, prompts, num_new))
        name = str(dtype).removeprefix("torch.")
        print(
            f"demo in {name} on {made.kernels}, beside the CPU's fp32: {same} of {num_prompts} sequences the same; "
            f"at the first difference of {different}, {near} have each token among the other's top {NUM_TOP}"
        )
        figures[f"demo {name}, same"], figures[f"demo {name}, different"] = same, different
        figures[f"demo {name}, near"] = near
    return figures
