"""`prepare_on_gpu`: a stage's weights as our kernels for GPUs want them, and runners on them. Needs triton."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from gptj_serve.kernels.gpu.edited_sampling import sample_on_gpu
from gptj_serve.kernels.gpu.layers import GPULayers
from gptj_serve.kernels.gpu.linear import GPULinear
from gptj_serve.kernels.gpu.sampling import DeviceSampler
from gptj_serve.kernels.gpu.weights import GPUBlock, MakeLinear, NativeLinear
from gptj_serve.model.block import GPTJBlock
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadCheckpoint
from gptj_serve.model.loading_progress import Progress
from gptj_serve.model.stage import GPTJStage, load_stage
from gptj_serve.pipeline.gpu.device import Device
from gptj_serve.pipeline.gpu.gpu_runner import GPUStageRunner
from gptj_serve.pipeline.stage_runner import StageSpec


def prepare_on_gpu(
    device: Device,
    checkpoint: Checkpoint,
    spec: StageSpec,
    heads: dict[str, HeadCheckpoint] | None,
    progress: Progress,
) -> Callable[[int], GPUStageRunner]:
    """As `StageRunner.prepare`."""
    blocks: list[GPUBlock] = []

    def take(block: GPTJBlock) -> None:
        blocks.append(packed_block(block, spec))

    stage = load_stage(checkpoint, spec.span, spec.dtype, device.torch_device, progress, take)
    return runner_maker(device, stage, blocks, spec, heads)


def packed_block(block: GPTJBlock, spec: StageSpec) -> GPUBlock:
    make_linear: MakeLinear = NativeLinear
    if spec.quantization != "none":
        make_linear = partial(GPULinear, kind=spec.quantization)
    return GPUBlock(block, make_linear)


def runner_maker(
    device: Device,
    stage: GPTJStage,
    blocks: list[GPUBlock],
    spec: StageSpec,
    heads: dict[str, HeadCheckpoint] | None = None,
) -> Callable[[int], GPUStageRunner]:
    """Makes runners with so many KV blocks of a stage whose layers became `blocks`."""
    if spec.quantization != "none" and isinstance(getattr(stage, "lm_head", None), nn.Linear):
        setattr(stage, "lm_head", GPULinear([stage.lm_head], kind=spec.quantization))  # noqa: B010 - of another class

    def make(num_kv_blocks: int) -> GPUStageRunner:
        layers = GPULayers(stage.config, blocks, num_kv_blocks, spec.block_size, spec.dtype, device.torch_device)
        own = replace(spec, num_kv_blocks=num_kv_blocks)
        return GPUStageRunner(stage, own, layers, device, DeviceSampler(), heads, sample_on_gpu)

    return make
