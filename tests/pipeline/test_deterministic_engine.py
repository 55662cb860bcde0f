"""The whole engine over deterministic stages: every number of every answer has the same bits, however it came about."""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.sampling import log_normalizers
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.kernels.choice import Kernels
from gptj_serve.kernels.cpu_layers import BLOCK_SIZE as CPU_BLOCK_SIZE
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.partition import head_cost, partition
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.types import (
    BeamParams,
    EngineRequest,
    Event,
    FailureEvent,
    Pooling,
    SamplingParams,
    Task,
    Warpers,
)

BLOCK_SIZE = 4
N_POSITIONS = 96  # of the tiny checkpoint
PLENTY = 1000  # KV blocks
SCARCE = N_POSITIONS // BLOCK_SIZE + 8
SCARCE_ON_OUR_KERNELS = N_POSITIONS // CPU_BLOCK_SIZE + 5


@asynccontextmanager
async def serving(
    directory: Path,
    *,
    num_stages: int,
    num_kv_blocks: int,
    max_microbatch_tokens: int,
    kernels: Kernels = "torch",
    schedules_ahead: bool = False,
) -> AsyncGenerator[LocalEngine]:
    checkpoint = Checkpoint.open(directory)
    config = checkpoint.config
    block_size = BLOCK_SIZE if kernels == "torch" else CPU_BLOCK_SIZE
    runners = []
    for span in partition(config.n_layer, num_stages, head_cost(config)):
        spec = StageSpec(
            span,
            num_kv_blocks,
            block_size,
            torch.float32,
            torch.device("cpu"),
            config.vocab_size,
            deterministic=True,
            kernels=kernels,
        )
        runners.append(StageRunner.load(checkpoint, spec))
    pipeline = InProcessPipeline(runners)
    limits = SchedulerLimits(num_stages, 64, max_microbatch_tokens, N_POSITIONS, schedules_ahead=schedules_ahead)
    try:
        async with LocalEngine(Scheduler(limits, KVBlocks(num_kv_blocks, block_size), frozenset({41})), pipeline) as it:
            yield it
    finally:
        pipeline.close()


async def answer(engine: LocalEngine, request: EngineRequest) -> list[Event]:
    events = [event async for event in engine.submit(request)]
    assert not any(isinstance(event, FailureEvent) for event in events), events
    return events


def sampling(rng: random.Random) -> SamplingParams:
    return rng.choice(
        [
            SamplingParams(max_new_tokens=20, num_top_logprobs=3, prompt_logprobs=True),
            SamplingParams(max_new_tokens=25, warpers=Warpers(temperature=1.0), seed=7, num_top_logprobs=2),
            SamplingParams(max_new_tokens=25, warpers=Warpers(temperature=1.2, top_p=0.9, top_k=40), seed=8),
            SamplingParams(max_new_tokens=20, warpers=Warpers(temperature=0.7, typical_p=0.9), repetition_penalty=1.1),
            SamplingParams(max_new_tokens=20, prompt_lookup_num_tokens=4, ignore_eos=True),
            SamplingParams(max_new_tokens=10, guidance_scale=1.5),
            SamplingParams(max_new_tokens=12, beams=BeamParams(num_beams=3, num_return_sequences=2)),
        ]
    )


def requests(num_requests: int, seed: int) -> list[EngineRequest]:
    """All tasks, prompts of all lengths, and some that begin alike."""
    rng = random.Random(seed)
    common = [rng.randrange(1, 96) for _ in range(60)]
    made = []
    for i in range(num_requests):
        prompt = common[: rng.randint(1, 60)] if i % 3 == 0 else []
        prompt += [rng.randrange(1, 96) for _ in range(rng.randint(1, 65 - len(prompt)))]
        task = rng.choice([Task.GENERATE] * 4 + [Task.CLASSIFY, Task.QA, Task.EMBED, Task.SCORE])
        made.append(
            EngineRequest(
                request_id=f"{task} {i}",
                task=task,
                prompt_token_ids=prompt,
                sampling=sampling(rng) if task is Task.GENERATE else None,
                pooling=rng.choice([Pooling.LAST, Pooling.ALL]) if task is Task.EMBED else Pooling.LAST,
                continuation_token_ids=[5, 6, 7] if task is Task.SCORE else [],
                num_top_logprobs=2 if task is Task.SCORE else 0,
            )
        )
    return made


@pytest.fixture(scope="module")
def asked() -> list[EngineRequest]:
    return requests(40, seed=1)


@pytest.fixture(scope="module")
def alone(tiny_gptj, asked: Sequence[EngineRequest]) -> Callable[[Kernels], Awaitable[list[list[Event]]]]:
    """Each answer of an engine that has nothing else to do, prompts in one piece."""
    made: dict[Kernels, list[list[Event]]] = {}

    async def one_by_one(kernels: Kernels) -> list[list[Event]]:
        if kernels not in made:
            made[kernels] = []
            for request in asked:
                async with serving(
                    tiny_gptj(), num_stages=1, num_kv_blocks=PLENTY, max_microbatch_tokens=512, kernels=kernels
                ) as engine:
                    made[kernels].append(await answer(engine, request))
        return made[kernels]

    return one_by_one


@pytest.mark.parametrize(
    ("num_stages", "num_kv_blocks", "max_microbatch_tokens", "kernels", "schedules_ahead"),
    [
        (1, PLENTY, 512, "torch", False),
        (1, SCARCE, 13, "torch", False),
        (1, SCARCE, 13, "torch", True),
        (2, PLENTY, 64, "torch", False),
        (3, SCARCE, 64, "torch", False),
        (6, PLENTY, 9, "torch", False),
        (1, SCARCE_ON_OUR_KERNELS, 64, "auto", False),
        (1, SCARCE_ON_OUR_KERNELS, 64, "auto", True),
        (2, PLENTY, 64, "auto", False),
        (6, SCARCE_ON_OUR_KERNELS, 64, "auto", False),
    ],
    indirect=["kernels"],
)
async def test_answers_have_the_same_bits(
    tiny_gptj, asked, alone, num_stages: int, num_kv_blocks: int, max_microbatch_tokens: int, kernels: Kernels,
    schedules_ahead: bool,
):  # fmt: skip
    expected = await alone(kernels)
    async with serving(
        tiny_gptj(),
        num_stages=num_stages,
        num_kv_blocks=num_kv_blocks,
        max_microbatch_tokens=max_microbatch_tokens,
        kernels=kernels,
        schedules_ahead=schedules_ahead,
    ) as engine:
        answers = await asyncio.gather(*(answer(engine, request) for request in asked))
        stats = engine.stats().as_dict()
    assert (stats["num_rows_ahead"] > 0) == schedules_ahead
    if num_kv_blocks == PLENTY:
        assert stats["num_prefix_tokens_reused"] > 0
    else:
        assert stats["num_preemptions"] > 0
    assert answers == expected


@pytest.mark.parametrize("num_times", [60, pytest.param(1000, marks=pytest.mark.large)])
async def test_one_prompt_again_and_again_among_random_traffic_has_one_answer(tiny_gptj, num_times: int):
    prompt = [3, 14, 15, 92, 6, 5, 35, 89, 79, 3, 23, 84]
    params = SamplingParams(max_new_tokens=16, warpers=Warpers(temperature=1.0), seed=5, num_top_logprobs=4)
    rng = random.Random(0)
    traffic = requests(num_times // 2, seed=2)

    async def one(engine: LocalEngine, index: int) -> str:
        await asyncio.sleep(rng.random() * num_times / 100)
        asked = EngineRequest(
            request_id=f"same {index}", task=Task.GENERATE, prompt_token_ids=prompt, sampling=params,
            cache_salt=str(index % 7),
        )  # fmt: skip
        return repr([(e.token_id, e.logprob.hex(), e.top_logprobs) for e in await answer(engine, asked)])

    async def other(engine: LocalEngine, request: EngineRequest) -> None:
        await asyncio.sleep(rng.random() * num_times / 100)
        await answer(engine, request)

    async with serving(tiny_gptj(), num_stages=3, num_kv_blocks=100, max_microbatch_tokens=48) as engine:
        others = asyncio.gather(*(other(engine, request) for request in traffic))
        answers = await asyncio.gather(*(one(engine, index) for index in range(num_times)))
        await others
        assert engine.stats().as_dict()["num_preemptions"] > 0
    assert len(set(answers)) == 1


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_lone_row_of_logits_is_normalized_like_one_among_others(num_threads: int):
    """With GPT-J's vocabulary: small ones are not cut."""
    logits = torch.randn(100, 50_400, generator=torch.Generator().manual_seed(0)) * 2
    expected = logits.logsumexp(dim=-1, keepdim=True)
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(torch.cat([log_normalizers(row[None]) for row in logits]), expected)
        assert torch.equal(log_normalizers(logits), expected)
    finally:
        torch.set_num_threads(1)
