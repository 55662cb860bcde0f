"""The device's sampler at the end of a stage's steps, on a device that is as late as can be."""

from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton")

from gptj_serve.kernels.gpu.edited_sampling import sample_on_gpu
from gptj_serve.kernels.gpu.sampling import DeviceSampler
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.stage import load_stage
from gptj_serve.pipeline.gpu.gpu_runner import GPUStageRunner
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.steps import LogitEdits, MicroBatch, Row, RowResult, SampleSpec, StepOutput
from gptj_serve.types import Warpers
from tests.pipeline.fake_device import FakeDevice
from tests.pipeline.reference_layers import ReferenceLayers

BLOCK_SIZE = 16
PROMPTS = [[5, 17, 40, 3, 88], [11, 33, 60, 4], [71], [9, 2, 70, 8]]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the fake device's tensors are the CPU's")

STEPS = {
    "drawn": [
        SampleSpec(),
        SampleSpec(Warpers(temperature=1.0), seed=3),
        SampleSpec(Warpers(temperature=1.2, top_k=20, top_p=0.9), seed=4),
        SampleSpec(Warpers(temperature=0.8, min_p=0.05), seed=5),
    ],
    "of all kinds": [
        SampleSpec(Warpers(temperature=1.0), seed=6, edits=LogitEdits(banned_token_ids=list(range(50)))),
        SampleSpec(Warpers(temperature=1.0, top_p=0.7), seed=7, num_top_logprobs=3),
        SampleSpec(Warpers(temperature=1.0, typical_p=0.6), seed=8),
        SampleSpec(Warpers(temperature=1.5), seed=9),
    ],
}


@pytest.fixture(scope="module")
def spec(tiny_gptj) -> tuple[Checkpoint, StageSpec]:
    checkpoint = Checkpoint.open(tiny_gptj())
    config = checkpoint.config
    return checkpoint, StageSpec(
        range(config.n_layer), 8, BLOCK_SIZE, torch.float32, torch.device("cpu"), config.vocab_size,
        max_num_sequences=4, max_microbatch_tokens=32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runner(spec: tuple[Checkpoint, StageSpec]) -> GPUStageRunner:
    checkpoint, stage_spec = spec
    stage = load_stage(checkpoint, stage_spec.span, stage_spec.dtype, stage_spec.device)
    layers = ReferenceLayers(stage, stage_spec.num_kv_blocks, BLOCK_SIZE)
    return GPUStageRunner(stage, stage_spec, layers, FakeDevice(), DeviceSampler(), sample=sample_on_gpu)


def results(output: StepOutput) -> list[RowResult]:
    found = [result for result in output.rows if result is not None]
    assert len(found) == len(PROMPTS)
    assert all(result.failure is None and len(result.tokens) == 1 for result in found)
    return found


def assert_equal(actual: Sequence[RowResult], wanted: Sequence[RowResult]) -> None:
    for one, other in zip(actual, wanted, strict=True):
        assert one.tokens[0].token_id == other.tokens[0].token_id
        assert one.tokens[0].logprob == pytest.approx(other.tokens[0].logprob, abs=1e-4)
        top_ids = [token_id for token_id, _ in one.tokens[0].top_logprobs]
        assert top_ids == [token_id for token_id, _ in other.tokens[0].top_logprobs]


@pytest.mark.parametrize("name", STEPS)
def test_steps_choose_the_tokens_of_the_torch_runner(
    spec: tuple[Checkpoint, StageSpec], runner: GPUStageRunner, name: str
):
    torch_runner = StageRunner.load(*spec)
    runner.restart()
    samples = STEPS[name]
    rows = [Row(p, 0, [i], samples=[sample]) for i, (p, sample) in enumerate(zip(PROMPTS, samples, strict=True))]
    wanted = results(torch_runner.run(MicroBatch(0, rows), None))
    assert_equal(results(runner.run(MicroBatch(0, rows), None)), wanted)
    for step in range(1, 4):
        rows = [
            Row([result.tokens[0].token_id], len(prompt) + step - 1, [i], samples=[sample])
            for i, (prompt, sample, result) in enumerate(zip(PROMPTS, samples, wanted, strict=True))
        ]
        wanted = results(torch_runner.run(MicroBatch(step, rows), None))
        assert_equal(results(runner.run(MicroBatch(step, rows), None)), wanted)
