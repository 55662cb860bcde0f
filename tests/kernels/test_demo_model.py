"""The demo checkpoint on our kernels: greedy answers are the same alone and in a crowd, and in 16 or 8 bits
log-probabilities stay near those of fp32."""

import asyncio
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.kernels.choice import Kernels, Quantization
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.pipeline.stage_status import describe_stage
from gptj_serve.steps import MicroBatch, Row, StepOutput
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import EngineRequest, SamplingParams, Task, TokenEvent

DEMO = Path(str(files("gptj_serve") / "demo"))
BLOCK_SIZE, NUM_BLOCKS, MAX_NEW_TOKENS = 16, 200, 12
TEXTS = [
    "The President said",
    "In the morning the people of the city went to the market to buy bread, milk and fruit for their children. Then",
    "What is",
    "She was born in London in 1923 and",
    "The museum is open every day from nine to five, except",
    "My name is Anna. I live in Paris. I work at the museum. I live in",
    "1, 2, 3, 4,",
    "The river",
]  # fmt: skip


@cache
def load(dtype: torch.dtype, quantization: Quantization, kernels: Kernels = "auto") -> list[StageRunner]:
    checkpoint = Checkpoint.open(DEMO)
    specs = [
        StageSpec(
            span, NUM_BLOCKS, BLOCK_SIZE, dtype, torch.device("cpu"), 4096, quantization=quantization, kernels=kernels
        )
        for span in (range(3), range(3, 6))
    ]
    return [StageRunner.load(checkpoint, spec) for spec in specs]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_directory(DEMO)
    return [tokenizer.encode(text) for text in TEXTS]


def target_logprobs(runners: Sequence[StageRunner], prompts: Sequence[list[int]]) -> Tensor:
    """Of each prompt's tokens but the first."""
    rows, first_block = [], 0
    for ids in prompts:
        num_blocks = -(-len(ids) // BLOCK_SIZE)
        table = list(range(first_block, first_block + num_blocks))
        rows.append(Row(ids[:-1], 0, table, first_target=0, target_token_ids=ids[1:]))
        first_block += num_blocks
    hidden = None
    for runner in runners:
        runner.restart()
        hidden = runner.run(MicroBatch(0, rows, []), hidden)
    assert isinstance(hidden, StepOutput)
    assert all(result is not None and result.failure is None for result in hidden.rows)
    return torch.cat([torch.tensor(result.targets.array[:, 0]) for result in hidden.rows])  # type: ignore[union-attr]


async def greedy(runners: Sequence[StageRunner], prompts: Sequence[list[int]]) -> list[list[TokenEvent]]:
    """All at once."""
    for runner in runners:
        runner.restart()
    pipeline = InProcessPipeline(list(runners))
    scheduler = Scheduler(SchedulerLimits(2, 64, 40, 1024), KVBlocks(NUM_BLOCKS, BLOCK_SIZE), frozenset())
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, num_top_logprobs=2)

    async def answer(engine: LocalEngine, index: int) -> list[TokenEvent]:
        request = EngineRequest(
            request_id=str(index), task=Task.GENERATE, prompt_token_ids=prompts[index], sampling=params
        )
        return [event async for event in engine.submit(request) if isinstance(event, TokenEvent)]

    try:
        async with LocalEngine(scheduler, pipeline) as engine:
            return await asyncio.gather(*(answer(engine, index) for index in range(len(prompts))))
    finally:
        pipeline.close()


PRECISIONS = [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.float32, "int8"), (torch.bfloat16, "int8")]
LARGEST_ERRORS = [1e-4, 0.1, 0.2, 0.2]  # of a log-probability


@pytest.fixture(autouse=True)
def _can_be_quantized(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["quantization"] == "int8":
        request.getfixturevalue("int8_kernels")


@pytest.mark.parametrize(("dtype", "quantization"), PRECISIONS)
async def test_greedy_answers_are_the_same_alone_and_in_a_crowd(
    prompts: list[list[int]], dtype: torch.dtype, quantization: Quantization
) -> None:
    runners = load(dtype, quantization)
    operands = "int8" if quantization == "int8" else str(dtype).removeprefix("torch.")
    assert [describe_stage(runner)["kernels"] for runner in runners] == [f"avx512-{operands}"] * 2
    together = await greedy(runners, prompts)
    assert [len(events) for events in together] == [MAX_NEW_TOKENS] * len(prompts)
    assert all(-20 < event.logprob <= 0 for events in together for event in events)
    for few in ([0], [3, 5], [1, 2, 4, 6, 7]):
        for index, events in zip(few, await greedy(runners, [prompts[i] for i in few]), strict=True):
            assert [(e.token_id, e.logprob, e.top_logprobs) for e in events] == [
                (e.token_id, e.logprob, e.top_logprobs) for e in together[index]
            ]


@pytest.mark.parametrize(
    ("dtype", "quantization", "largest"),
    [(*precision, largest) for precision, largest in zip(PRECISIONS, LARGEST_ERRORS, strict=True)],
)
def test_log_probabilities_are_near_those_of_fp32(
    prompts: list[list[int]], dtype: torch.dtype, quantization: Quantization, largest: float
) -> None:
    exact = target_logprobs(load(torch.float32, "none", "torch"), prompts)
    error = (target_logprobs(load(dtype, quantization), prompts) - exact).abs()
    assert 0 < error.max() < largest
    assert error.mean() < largest / 4
