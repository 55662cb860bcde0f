"""`GPUStageRunner`: a `StageRunner` whose steps need not be over before the next one begins."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from gptj_serve.engine.sampling import Sample, sample
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
    """`run` in two parts, `begin` and what waits for results. A pipeline calls them in two threads: so the device has
    its next step before the results of the last one are here."""

    def __init__(
        self,
        stage: GPTJStage,
        spec: StageSpec,
        layers: DeviceLayers,
        device: Device,
        sampler: Sampler,
        heads: Mapping[str, HeadCheckpoint] | None = None,
        sample: Sample = sample,
    ) -> None:
        """The layers of `stage` were taken for `layers`. Captures the graphs. `sample` chooses what `sampler` can't."""
        # All that the base class would make is on the device already, or is not needed.
        self.stage = stage
        self.spec = spec
        self._device_layers = layers
        self._device = device
        self._last_microbatch_id = None
        limits = Limits(
            dtype=spec.dtype,
            num_token_ids=stage.config.vocab_size,
            num_sampled_ids=spec.num_token_ids,
            num_positions=stage.config.n_positions,
            num_kv_blocks=spec.num_kv_blocks,
            block_size=spec.block_size,
            max_rows=spec.max_num_sequences,
            max_tokens=max(spec.max_num_sequences, spec.max_microbatch_tokens),
        )
        outputs = RowOutputs(stage, spec.num_token_ids, heads or {}, sample=sample) if stage.is_last else None
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
        """Forget the order and the tokens so far."""
        self._last_microbatch_id = None
        self._gpu_stage.restart()

    @torch.inference_mode()
    def begin(self, microbatch: MicroBatch, hidden: Tensor | DeviceHidden | None) -> GPUStep:
        """Give the step to the device, in the order of microbatches; to be called in one thread at a time."""
        self._check_order(microbatch.microbatch_id)
        return self._gpu_stage.begin(microbatch, hidden)

    @torch.inference_mode()
    def output(self, step: GPUStep) -> StepOutput:
        """Wait for what comes of the last stage's step. In any thread."""
        return step.output()

    @contextmanager
    def hidden_of(self, step: GPUStep) -> Iterator[Tensor]:
        """The hidden states [T, D] that come of another stage's step, for what torch does next in this thread. They
        are overwritten some time after."""
        assert step.hidden is not None
        here = self._device.here()
        here.follow(step.hidden.ready)
        yield step.hidden.tensor
        step.hidden.give_back(here.record())

    def run(self, microbatch: MicroBatch, hidden: Tensor | DeviceHidden | None) -> Tensor | StepOutput:
        """As one: the hidden states are the caller's."""
        step = self.begin(microbatch, hidden)
        if step.hidden is None:
            return self.output(step)
        with self.hidden_of(step) as states:
            return states.clone()
