"""Numbers that leave the range of a dtype anywhere in the model end the requests that they reach, whatever these ask
for: never a wrong answer in silence."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.sampling import NOT_FINITE
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.kernels.choice import Kernels, Quantization
from gptj_serve.kernels.cpu_layers import BLOCK_SIZE as CPU_BLOCK_SIZE
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.partition import partition
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
    is_terminal,
)

CheckpointFactory = Callable[..., Path]

NUM_BLOCKS, BLOCK_SIZE, N_POSITIONS = 200, 4, 96
PROMPT = [5, 17, 40, 3, 88, 61, 9, 9, 52, 30, 71, 2]
POISON = 77
COLUMN = 13  # of the second of four heads' eight; the first four of each are rotated

SAMPLINGS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(max_new_tokens=4),
    "drawn": SamplingParams(max_new_tokens=4, warpers=Warpers(temperature=1.0)),
    "narrowed": SamplingParams(max_new_tokens=4, warpers=Warpers(temperature=0.7, top_k=5, top_p=0.8, min_p=0.1)),
    "typical": SamplingParams(max_new_tokens=4, warpers=Warpers(temperature=1.0, typical_p=0.5)),
    "cut off": SamplingParams(max_new_tokens=4, warpers=Warpers(temperature=1.0, epsilon_cutoff=1e-3, eta_cutoff=1e-3)),
    "beams": SamplingParams(max_new_tokens=4, beams=BeamParams(num_beams=3)),
    "guided": SamplingParams(max_new_tokens=4, guidance_scale=2.0, negative_prompt_token_ids=[4, 5]),
    "penalties": SamplingParams(max_new_tokens=4, repetition_penalty=1.3, frequency_penalty=0.5),
    "few allowed": SamplingParams(max_new_tokens=4, allowed_token_ids=[1, 2, 3]),
    "logprobs": SamplingParams(max_new_tokens=4, num_top_logprobs=3, prompt_logprobs=True),
    "drafted": SamplingParams(max_new_tokens=4, prompt_lookup_num_tokens=3),
}


def requests(prompt: list[int], prefix: str = "") -> list[EngineRequest]:
    """One of each kind."""
    made = [
        EngineRequest(request_id=prefix + name, task=Task.GENERATE, prompt_token_ids=prompt, sampling=sampling)
        for name, sampling in SAMPLINGS.items()
    ]
    for task, pooling in (
        (Task.CLASSIFY, Pooling.LAST),
        (Task.CLASSIFY, Pooling.MEAN),
        (Task.QA, Pooling.LAST),
        (Task.EMBED, Pooling.LAST),
        (Task.EMBED, Pooling.MEAN),
        (Task.EMBED, Pooling.ALL),
    ):
        made.append(
            EngineRequest(request_id=f"{prefix}{task} {pooling}", task=task, prompt_token_ids=prompt, pooling=pooling)
        )
    made.append(
        EngineRequest(
            request_id=f"{prefix}score", task=Task.SCORE, prompt_token_ids=prompt, continuation_token_ids=[7, 8, 9],
            num_top_logprobs=2,
        )
    )  # fmt: skip
    return made


@asynccontextmanager
async def serving(runners: list[StageRunner]) -> AsyncGenerator[LocalEngine]:
    pipeline = InProcessPipeline(runners)
    limits = SchedulerLimits(len(runners), 64, 16, N_POSITIONS)  # prompts are cut in two
    scheduler = Scheduler(limits, KVBlocks(NUM_BLOCKS, runners[0].spec.block_size), frozenset({41}))
    try:
        async with LocalEngine(scheduler, pipeline) as engine:
            yield engine
            scheduler.check_integrity()
            assert scheduler.blocks.num_used == 0
    finally:
        pipeline.close()


def make_runners(
    directory: Path, dtype: torch.dtype, kernels: Kernels = "torch", quantization: Quantization = "none"
) -> list[StageRunner]:
    checkpoint = Checkpoint.open(directory)
    cpu, block_size = torch.device("cpu"), BLOCK_SIZE if kernels == "torch" else CPU_BLOCK_SIZE
    specs = [
        StageSpec(span, NUM_BLOCKS, block_size, dtype, cpu, checkpoint.config.vocab_size, False, quantization, kernels)
        for span in partition(checkpoint.config.n_layer, 2, 1.0)
    ]
    return [StageRunner.load(checkpoint, spec) for spec in specs]


async def answer(engine: LocalEngine, request: EngineRequest) -> list[Event]:
    return [event async for event in engine.submit(request)]


async def answers(engine: LocalEngine, requests: list[EngineRequest]) -> list[list[Event]]:
    return await asyncio.gather(*(answer(engine, request) for request in requests))


def failures(requests: list[EngineRequest]) -> list[list[Event]]:
    return [[FailureEvent(request.request_id, NOT_FINITE)] for request in requests]


@pytest.mark.parametrize(
    ("dtype", "kernels", "quantization"),
    [
        (torch.float32, "torch", "none"),
        (torch.bfloat16, "torch", "none"),
        (torch.float16, "torch", "none"),
        (torch.float32, "auto", "none"),
        (torch.bfloat16, "auto", "none"),
        (torch.float32, "auto", "int8"),
    ],
    indirect=["kernels"],
)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
async def test_whatever_is_asked_for_it_ends_with_the_error_and_others_go_on(
    request: pytest.FixtureRequest,
    tiny_gptj: CheckpointFactory,
    dtype: torch.dtype,
    kernels: Kernels,
    quantization: Quantization,
    wrong: float,
) -> None:
    """The embedding of one token is not finite; half of the requests have it in their prompt."""
    if quantization == "int8":
        request.getfixturevalue("int8_kernels")
    runners = make_runners(tiny_gptj(), dtype, kernels, quantization)
    with torch.no_grad():
        runners[0].stage.wte.weight[POISON] = wrong
    bad = requests([*PROMPT[:3], POISON, *PROMPT[4:]])
    async with serving(runners) as engine:
        ends = await answers(engine, [*bad, *requests(PROMPT, "sound ")])
        stats = engine.stats()
    assert ends[: len(bad)] == failures(bad)
    assert not any(isinstance(events[-1], FailureEvent) for events in ends[len(bad) :])
    assert all(is_terminal(events[-1]) for events in ends)
    assert (stats.num_requests_not_finite, stats.num_requests_failed) == (len(bad), len(bad))


@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize("name", ["ln_1", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"])
async def test_no_overflow_of_float16_passes_in_silence(tiny_gptj: CheckpointFactory, layer: int, name: str) -> None:
    """All weights are finite; what comes of them at one place in the model is not."""
    runners = make_runners(tiny_gptj(), torch.float16)
    module = module_of(runners, f"h.{layer}.{name}")
    with torch.no_grad():
        module.weight.mul_(6e4 / module.weight.abs().max())
    async with serving(runners) as engine:
        assert await answers(engine, requests(PROMPT)) == failures(requests(PROMPT))


@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize("name", ["attn.q_proj", "attn.k_proj"])
@pytest.mark.parametrize("sign", [1, -1])
async def test_no_overflow_in_front_of_attention_passes_in_silence(
    tiny_gptj: CheckpointFactory, layer: int, name: str, sign: int
) -> None:
    """One column of one head overflows for every token: all scores may be -infinity, of which attention makes zeros."""
    runners = make_runners(tiny_gptj(), torch.float16)
    projection = module_of(runners, f"h.{layer}.{name}")
    with torch.no_grad():
        projection.weight[COLUMN] = 0
        norm = module_of(runners, f"h.{layer}.ln_1")
        norm.bias[0] = 10.0
        norm.weight[0] = 0.0
        projection.weight[COLUMN, 0] = sign * 6e4
    async with serving(runners) as engine:
        assert await answers(engine, requests(PROMPT)) == failures(requests(PROMPT))


def module_of(runners: list[StageRunner], name: str) -> nn.Module:
    return next(m for runner in runners for n, m in runner.stage.named_modules() if n == name or n.endswith(f".{name}"))
