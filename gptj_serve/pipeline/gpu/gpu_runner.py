"""`GPUStageRunner`: a `StageRunner` whose steps need not be over before the next one begins."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gptj_serve.kernels.gpu.linear import GPULinear
from gptj_serve.model.heads import HeadCheckpoint
from gptj_serve.model.stage import GPTJStage
from gptj_serve.pipeline.gpu.device import Device
from gptj_serve.pipeline.gpu.gpu_stage import DeviceLayers, GPUStage
from gptj_serve.pipeline.gpu.gpu_step import DeviceHidden, GPUStep
from gptj_serve.pipeline.gpu.sampler import Sampler
from gptj_serve.pipeline.gpu.step_buffers import Limits
from gptj_serve.pipeline.row_outputs import RowOutputs
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.steps import MicroBatch, StepOutput


class GPUStageRunner(StageRunner):
    """`run` is `begin` and `finish`, which a pipeline calls in different threads: so the device always has work."""

    def __init__(
        self,
        stage: GPTJStage,
        spec: StageSpec,
        layers: DeviceLayers,
        device: Device,
        sampler: Sampler,
        heads: Mapping[str, HeadCheckpoint] | None = None,
    ) -> None:
        """The layers of `stage` were taken for `layers`. Captures the graphs."""
        # All that the base class would make is on the device already, or is not needed.
        self.stage = stage
        self.spec = spec
        self._device_layers = layers
        self._last_microbatch_id = None
        limits = Limits(
            dtype=spec.dtype,
            num_token_ids=stage.config.vocab_size,
            num_sampled_ids=spec.num_token_ids,
            num_positions=stage.config.n_positions,
            num_kv_blocks=spec.num_kv_blocks,
            block_size=spec.block_size,
            max_rows=min(spec.max_num_sequences, spec.max_microbatch_tokens),
            max_tokens=spec.max_microbatch_tokens,
        )
        outputs = RowOutputs(stage, spec.num_token_ids, heads or {}) if stage.is_last else None
        self._gpu_stage = GPUStage(device, stage, layers, limits, sampler, outputs)

    @property
    def kernels(self) -> str:
        return self._device_layers.kernels

    @property
    def weight_bytes(self) -> int:
        own = sum(parameter.nbytes for parameter in self.stage.parameters())
        quantized = sum(module.num_bytes for module in self.stage.modules() if isinstance(module, GPULinear))
        return own + quantized + self._device_layers.weight_bytes

    @property
    def kv_cache_bytes(self) -> int:
        return self._device_layers.kv_cache_bytes

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        self._gpu_stage.synchronize()

    def restart(self) -> None:
        super().restart()
        self._gpu_stage.restart()

    @torch.inference_mode()
    def begin(self, microbatch: MicroBatch, hidden: Tensor | DeviceHidden | None) -> GPUStep:
        """Give the step to the device, in the order of microbatches; to be called in one thread at a time."""
        self._check_order(microbatch.microbatch_id)
        return self._gpu_stage.begin(microbatch, hidden)

    @torch.inference_mode()
    def finish(self, step: GPUStep) -> Tensor | StepOutput:
        """Wait for what comes of a step; hidden states are the caller's, and on the device. In any thread."""
        if step.hidden is None:
            return step.output()
        step.wait()
        hidden = step.hidden.tensor.clone()
        step.hidden.give_back(None)
        return hidden

    def run(self, microbatch: MicroBatch, hidden: Tensor | DeviceHidden | None) -> Tensor | StepOutput:
        return self.finish(self.begin(microbatch, hidden))
