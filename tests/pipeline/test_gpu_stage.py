"""Stages on a device that is as late as can be: the same answers, nothing waited for, and graphs made once."""

from typing import Any

import pytest
import torch

from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.stage import load_stage
from gptj_serve.pipeline.gpu.gpu_runner import GPUStageRunner
from gptj_serve.pipeline.gpu.sampler import GreedySampler
from gptj_serve.pipeline.partition import partition
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.steps import MicroBatch, Row, SampleSpec, StepOutput
from tests.pipeline.fake_device import FakeDevice
from tests.pipeline.reference_layers import ReferenceLayers

BLOCK_SIZE = 4
NUM_BLOCKS = 64
MAX_ROWS = 12
MAX_TOKENS = 64


@pytest.fixture(scope="module")
def checkpoint(tiny_gptj) -> Checkpoint:
    return Checkpoint.open(tiny_gptj())


def specs_of(checkpoint: Checkpoint, num_stages: int) -> list[StageSpec]:
    return [
        StageSpec(
            span, NUM_BLOCKS, BLOCK_SIZE, torch.float32, torch.device("cpu"), checkpoint.config.vocab_size,
            max_num_sequences=MAX_ROWS, max_microbatch_tokens=MAX_TOKENS,
        )
        for span in partition(checkpoint.config.n_layer, num_stages, 1.0)
    ]  # fmt: skip


def gpu_runners(checkpoint: Checkpoint, device: FakeDevice, num_stages: int = 1) -> list[GPUStageRunner]:
    runners = []
    for spec in specs_of(checkpoint, num_stages):
        stage = load_stage(checkpoint, spec.span, spec.dtype, spec.device)
        layers = ReferenceLayers(stage, NUM_BLOCKS, BLOCK_SIZE)
        runners.append(GPUStageRunner(stage, spec, layers, device, GreedySampler()))
    return runners


def run(runners: list[Any], microbatch: MicroBatch) -> StepOutput:
    result: Any = None
    for runner in runners:
        result = runner.run(microbatch, result)
    return result


def chosen(output: StepOutput) -> list[list[int]]:
    return [[token.token_id for token in row.tokens] for row in output.rows]


PROMPTS = [[5, 17, 40, 3, 88, 61, 9, 9, 52], [11, 33, 60, 4], [71]]


def prompts(microbatch_id: int = 0) -> MicroBatch:
    rows = [
        Row(p, 0, list(range(8 * i, 8 * i + -(-len(p) // BLOCK_SIZE))), samples=[SampleSpec()])
        for i, p in enumerate(PROMPTS)
    ]
    return MicroBatch(microbatch_id, rows)


def decodes(microbatch_id: int, tokens: list[int], num_done: int, fed: bool = False) -> MicroBatch:
    """The next token of each."""
    rows = []
    for i, (prompt, token) in enumerate(zip(PROMPTS, tokens, strict=True)):
        at = len(prompt) + num_done
        table = list(range(8 * i, 8 * i + at // BLOCK_SIZE + 1))
        rows.append(Row([0 if fed else token], at, table, samples=[SampleSpec()], fed_from=i if fed else None))
    return MicroBatch(microbatch_id, rows)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_prompts_and_decode_steps_give_what_the_torch_runner_gives(checkpoint: Checkpoint, num_stages: int):
    expected_runner = [StageRunner.load(checkpoint, spec) for spec in specs_of(checkpoint, num_stages)]
    runners = gpu_runners(checkpoint, FakeDevice(), num_stages)
    expected = run(expected_runner, prompts())
    output = run(runners, prompts())
    assert chosen(output) == chosen(expected)
    for step in range(1, 8):
        tokens = [row.tokens[0].token_id for row in expected.rows]
        microbatch = decodes(step, tokens, step - 1)
        expected, output = run(expected_runner, microbatch), run(runners, microbatch)
        assert chosen(output) == chosen(expected)
        for row, expected_row in zip(output.rows, expected.rows, strict=True):
            assert row.tokens[0].logprob == pytest.approx(expected_row.tokens[0].logprob, abs=1e-4)
