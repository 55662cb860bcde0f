"""The demo checkpoint on the device and on the CPU in fp32: the same tokens, and near ones in half precision.

Tokens are chosen on the device, in graphs, and steps are scheduled ahead. Log-probabilities of other tokens, which the
device's own sampler doesn't tell, are asked for in a run of its own, of the sequences that differ.
"""

import asyncio
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.random_stages import random_prompts
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.types import EngineRequest, SamplingParams, Task, TokenEvent, Warpers

NUM_TOP = 5
NUM_KV_BLOCKS, BLOCK_SIZE = 1024, 16
MAX_SEQUENCES, MAX_TOKENS = 64, 512
DRAWN = (Warpers(temperature=1.0), Warpers(temperature=0.8, top_k=40, top_p=0.95))

Chosen = list[TokenEvent]


class Generated(NamedTuple):
    chosen: list[Chosen]  # for each prompt
    num_rows_ahead: int  # that were given to the device before the step that chose their token was over


def greedy(num_prompts: int, num_new: int, num_top: int = 0) -> list[SamplingParams]:
    return [SamplingParams(max_new_tokens=num_new, ignore_eos=True, num_top_logprobs=num_top)] * num_prompts


def drawn(num_prompts: int, num_new: int) -> list[SamplingParams]:
    return [
        SamplingParams(max_new_tokens=num_new, ignore_eos=True, warpers=DRAWN[i % len(DRAWN)], seed=i)
        for i in range(num_prompts)
    ]


def generate(runner: StageRunner, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> Generated:
    """All prompts at a time."""

    async def run() -> Generated:
        pipeline = InProcessPipeline([runner])
        await pipeline.recover()  # microbatches are counted from 0 again
        config = runner.stage.config
        limits = SchedulerLimits(1, MAX_SEQUENCES, MAX_TOKENS, config.n_positions, schedules_ahead=True)
        blocks = KVBlocks(runner.spec.num_kv_blocks, runner.spec.block_size, reuse_prefixes=False)
        async with LocalEngine(Scheduler(limits, blocks, frozenset()), pipeline) as engine:

            async def one(index: int, prompt: list[int], params: SamplingParams) -> Chosen:
                request = EngineRequest(
                    request_id=str(index), task=Task.GENERATE, prompt_token_ids=prompt, sampling=params
                )
                return [event async for event in engine.submit(request) if isinstance(event, TokenEvent)]

            pairs = enumerate(zip(prompts, sampling, strict=True))
            chosen = await asyncio.gather(*(one(index, *pair) for index, pair in pairs))
            num_rows_ahead = engine.stats().num_rows_ahead
        pipeline.close()
        return Generated(chosen, num_rows_ahead)

    return asyncio.run(run())


def token_ids(chosen: Chosen) -> list[int]:
    return [event.token_id for event in chosen]


def differing(expected: Sequence[Chosen], found: Sequence[Chosen]) -> list[int]:
    """Which sequences."""
    pairs = zip(expected, found, strict=True)
    return [index for index, (theirs, ours) in enumerate(pairs) if token_ids(theirs) != token_ids(ours)]


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
        return StageRunner.load(
            checkpoint,
            StageSpec(
                span, NUM_KV_BLOCKS, BLOCK_SIZE, dtype, where, config.vocab_size,
                max_num_sequences=MAX_SEQUENCES, max_microbatch_tokens=MAX_TOKENS,
            ),
        )  # fmt: skip

    figures: dict[str, float] = {}
    comparison = Comparison(runner(torch.device("cpu"), torch.float32), prompts, num_new)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = runner(device, dtype)
        name = str(dtype).removeprefix("torch.")
        found = comparison.of(made)
        print(f"demo in {name} on {made.kernels}, beside the CPU's fp32: {found}", flush=True)
        figures |= {f"demo {name}, {what}": float(count) for what, count in found._asdict().items()}
    return figures


class Counts(NamedTuple):
    sequences: int  # of each kind
    greedy_same: int  # to their end
    drawn_same: int
    rows_ahead: int
    different_again: int  # of the greedy ones that weren't the same, with log-probabilities asked for
    near: int  # of these those where at the first difference each token is among the other's best

    def __str__(self) -> str:
        return (
            f"of {self.sequences} sequences each {self.greedy_same} greedy and {self.drawn_same} drawn ones are the "
            f"same ({self.rows_ahead} rows were scheduled ahead); of the other greedy ones {self.different_again} "
            f"differ again beside log-probabilities, {self.near} of them from a token among the other's top {NUM_TOP}"
        )


class Comparison:
    """With what `expected` gives."""

    def __init__(self, expected: StageRunner, prompts: Sequence[list[int]], num_new: int) -> None:
        self._prompts = prompts
        self._num_new = num_new
        self._greedy = generate(expected, prompts, greedy(len(prompts), num_new, NUM_TOP)).chosen
        self._drawn = generate(expected, prompts, drawn(len(prompts), num_new)).chosen

    def of(self, runner: StageRunner) -> Counts:
        count = len(self._prompts)
        best = generate(runner, self._prompts, greedy(count, self._num_new))
        by_chance = generate(runner, self._prompts, drawn(count, self._num_new))
        different = differing(self._greedy, best.chosen)
        num_again = num_near = 0
        if different:
            again = generate(
                runner, [self._prompts[i] for i in different], greedy(len(different), self._num_new, NUM_TOP)
            )
            _, num_again, num_near = compare([self._greedy[i] for i in different], again.chosen)
        return Counts(
            sequences=count,
            greedy_same=count - len(different),
            drawn_same=count - len(differing(self._drawn, by_chance.chosen)),
            rows_ahead=best.num_rows_ahead + by_chance.num_rows_ahead,
            different_again=num_again,
            near=num_near,
        )
