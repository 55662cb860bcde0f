"""`SamplingSteps`: the end of the last stage's steps: from logits to tokens on their way to the host.

Shapes: `S` places with logits, padded to one of the sizes that there are graphs for, `D` n_embd.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from gptj_serve.model.stage import GPTJStage
from gptj_serve.pipeline.gpu.buffer_pool import BufferPool
from gptj_serve.pipeline.gpu.device import Device, Event, Stream
from gptj_serve.pipeline.gpu.graphs import Graphs
from gptj_serve.pipeline.gpu.sampler import Sampler, row_results
from gptj_serve.pipeline.gpu.staging import Staging
from gptj_serve.pipeline.gpu.step_buffers import Limits
from gptj_serve.steps import RowResult, SampleSpec


class SamplingSteps:
    """Graphs apart from those of the layers: one for each number of places and mode of the sampler."""

    def __init__(
        self, device: Device, stream: Stream, graphs: Graphs, stage: GPTJStage, limits: Limits, sampler: Sampler
    ) -> None:
        self._stream = stream
        self._graphs = graphs
        self._lm_head = stage.lm_head if hasattr(stage, "lm_head") else None
        self._limits = limits
        self._sampler = sampler
        self._parameters = Staging(device, stream, sampler.num_fields * limits.max_rows, torch.int64)
        self._logits = device.zeros((limits.max_rows, stage.config.vocab_size), limits.dtype)
        self._chosen = device.zeros((3 * limits.max_rows,), torch.int32)
        self._tables = BufferPool(lambda: device.pinned((3 * limits.max_rows,), torch.int32))

    @property
    def can_sample(self) -> Callable[[SampleSpec], bool]:
        return self._sampler.can_sample

    @property
    def token_ids(self) -> Tensor:
        """[S], chosen in the last step that chose any."""
        return self._chosen

    def set_logits(self, hidden: Tensor) -> None:
        """Those after hidden states [S, D], for the sampler."""
        if self._lm_head is not None:
            self._logits[: len(hidden)].copy_(self._lm_head(hidden))

    def works(self, sizes: Sequence[int]) -> list[tuple[Hashable, Callable[[], object]]]:
        """What there are to be graphs of, the largest first."""
        keys = [(size, mode) for size in reversed(sizes) for mode in reversed(self._sampler.modes)]
        return [(key, partial(self._sample, *key)) for key in keys]

    def put(self, size: int, specs: Sequence[SampleSpec], positions: Sequence[int]) -> Callable[[], list[RowResult]]:
        """Choose a token for each spec after the logits of `size` places; → what waits for them."""
        num_parameters = self._sampler.num_fields * size
        half = self._parameters.halves[self._parameters.begin()][:num_parameters]
        mode = self._sampler.write(half.view(self._sampler.num_fields, size), specs, positions)
        self._parameters.send(num_parameters)
        self._graphs.replay((size, mode))
        table = self._tables.take(self._stream)
        self._stream.copy(table[: 3 * size], self._chosen[: 3 * size])
        return partial(self._results, self._stream.record(), table, size, len(specs))

    def _sample(self, size: int, mode: int) -> None:
        num_fields = self._sampler.num_fields
        parameters = self._parameters.on_device[: num_fields * size].view(num_fields, size)
        sampled = self._sampler.sample(self._logits[:size], self._limits.num_sampled_ids, parameters, mode)
        self._chosen[: 3 * size].view(3, size).copy_(sampled)

    def _results(self, copied: Event, table: Tensor, size: int, num_specs: int) -> list[RowResult]:
        copied.wait()
        results = row_results(table[: 3 * size].view(3, size)[:, :num_specs])
        self._tables.give_back(table)
        return results
