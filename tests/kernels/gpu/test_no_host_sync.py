"""On a GPU: to begin a step makes the host wait for nothing, nor copy what isn't pinned. torch says so itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.loading_progress import silent
from gptj_serve.pipeline.gpu.cuda_device import CUDADevice
from gptj_serve.pipeline.gpu.gpu_step import DeviceHidden, GPUStep
from gptj_serve.pipeline.gpu.loading import prepare_on_gpu
from gptj_serve.steps import MicroBatch, Row, SampleSpec, StepOutput
from gptj_serve.types import Warpers
from tests.pipeline.gpu_runners import run, specs_of, torch_runners

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPTS = [[5, 17, 40, 3, 88], [11, 33, 60, 4], [71]]
SPECS = [SampleSpec(), SampleSpec(Warpers(temperature=1.0), seed=3), SampleSpec(Warpers(temperature=0.9, top_k=9))]
NUM_STEPS = 4


@contextmanager
def host_may_not_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def prompts() -> MicroBatch:
    rows = [Row(p, 0, [4 * i, 4 * i + 1], samples=[SPECS[i]]) for i, p in enumerate(PROMPTS)]
    return MicroBatch(0, rows, [(20, 21)])


def decode(step: int, token_ids: list[int] | None) -> MicroBatch:
    """Without `token_ids` those of the step before, which nobody has seen."""
    rows = []
    for i, prompt in enumerate(PROMPTS):
        start = len(prompt) + step - 1
        token_id, fed_from = (0, i) if token_ids is None else (token_ids[i], None)
        table = list(range(4 * i, 4 * i + 3))
        rows.append(Row([token_id], start, table, samples=[SPECS[i]], fed_from=fed_from))
    return MicroBatch(step, rows)


def tokens_of(output: StepOutput) -> list[int]:
    assert all(row is not None and row.failure is None for row in output.rows)
    return [row.tokens[0].token_id for row in output.rows if row is not None]


@pytest.mark.parametrize("num_stages", [1, 2])
def test_to_begin_a_step_waits_for_nothing(tiny_gptj, device: torch.device, num_stages: int) -> None:
    checkpoint = Checkpoint.open(tiny_gptj(n_layer=2))
    torchs = torch_runners(checkpoint)
    expected = [tokens_of(run(torchs, prompts()))]
    for step in range(1, NUM_STEPS):
        expected.append(tokens_of(run(torchs, decode(step, expected[-1]))))
    where = CUDADevice(device)
    runners = [
        prepare_on_gpu(where, checkpoint, replace(spec, device=device, kernels="auto"), None, silent)(
            spec.num_kv_blocks
        )
        for spec in specs_of(checkpoint, num_stages)
    ]
    steps: list[GPUStep] = []
    with host_may_not_wait():
        for number in range(NUM_STEPS):
            seen = None if num_stages == 1 else expected[number - 1]
            microbatch = decode(number, seen) if number else prompts()
            hidden: DeviceHidden | None = None
            for runner in runners:
                step = runner.begin(microbatch, hidden)
                hidden = step.hidden
            steps.append(step)
    assert [tokens_of(runners[-1].output(step)) for step in steps] == expected


def test_torch_does_say_so(device: torch.device) -> None:
    x = torch.ones(3, device=device)
    with host_may_not_wait(), pytest.raises(RuntimeError, match="synchron"):
        x.sum().item()
    with host_may_not_wait(), pytest.raises(RuntimeError, match="synchron"):
        torch.ones(3).to(device)
