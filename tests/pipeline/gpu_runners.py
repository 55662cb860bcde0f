"""Runners on a `FakeDevice`, with layers in plain torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadCheckpoint
from gptj_serve.model.stage import GPTJStage, load_stage
from gptj_serve.pipeline.gpu.gpu_runner import GPUStageRunner
from gptj_serve.pipeline.gpu.sampler import GreedySampler
from gptj_serve.pipeline.partition import partition
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.steps import MicroBatch, StepOutput
from tests.pipeline.fake_device import FakeDevice
from tests.pipeline.reference_layers import ReferenceLayers

BLOCK_SIZE = 4
NUM_BLOCKS = 64
MAX_ROWS = 6
MAX_TOKENS = 48


def specs_of(checkpoint: Checkpoint, num_stages: int, **changes: Any) -> list[StageSpec]:
    config = checkpoint.config
    values = {
        "num_kv_blocks": NUM_BLOCKS,
        "max_num_sequences": MAX_ROWS,
        "max_microbatch_tokens": MAX_TOKENS,
        **changes,
    }
    return [
        StageSpec(
            span,
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
            device=torch.device("cpu"),
            num_token_ids=config.vocab_size,
            kernels="torch",
            **values,
        )
        for span in partition(config.n_layer, num_stages, 1.0)
    ]


def torch_runners(checkpoint: Checkpoint, num_stages: int = 1, **changes: Any) -> list[StageRunner]:
    return [StageRunner.load(checkpoint, spec) for spec in specs_of(checkpoint, num_stages, **changes)]


def gpu_runners(
    checkpoint: Checkpoint,
    device: FakeDevice,
    num_stages: int = 1,
    heads: dict[str, HeadCheckpoint] | None = None,
    make_layers: Callable[[GPTJStage, int, int], ReferenceLayers] = ReferenceLayers,
    **changes: Any,
) -> list[GPUStageRunner]:
    runners = []
    for spec in specs_of(checkpoint, num_stages, **changes):
        stage = load_stage(checkpoint, spec.span, spec.dtype, spec.device)
        layers = make_layers(stage, spec.num_kv_blocks, BLOCK_SIZE)
        runners.append(GPUStageRunner(stage, spec, layers, device, GreedySampler(), heads))
    return runners


def run(runners: Sequence[StageRunner], microbatch: MicroBatch) -> StepOutput:
    result: Any = None
    for runner in runners:
        result = runner.run(microbatch, result)
    assert isinstance(result, StepOutput)
    return result
