"""`GPUStage`: a stage's steps on a device, from what a microbatch says to tokens, without waiting for anything between.

`begin` puts a step into the stage's stream and returns; the next one may begin while it runs, fed with tokens that
nobody has seen yet. Steps of rows with one token each are graphs, captured at the start; then tokens are chosen, in
graphs too. All tensors that steps share, and graphs begin and end with, are made at the start.
Shapes: `T` packed tokens and `S` places with logits, both padded, `D` n_embd, `W` vocab_size.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from msgspec.structs import replace
from torch import Tensor

from gptj_serve.kernels.gpu.rows import DeviceRows
from gptj_serve.model.attention import simultaneous
from gptj_serve.model.stage import GPTJStage
from gptj_serve.pipeline.gpu.buckets import DecodeBuckets, padded_tokens
from gptj_serve.pipeline.gpu.buffer_pool import BufferPool
from gptj_serve.pipeline.gpu.device import Device
from gptj_serve.pipeline.gpu.gpu_step import DeviceHidden, GPUStep
from gptj_serve.pipeline.gpu.graphs import Graphs
from gptj_serve.pipeline.gpu.sampler import Sampler
from gptj_serve.pipeline.gpu.sampling_steps import SamplingSteps
from gptj_serve.pipeline.gpu.staging import Staging
from gptj_serve.pipeline.gpu.step_buffers import (
    MIN_PADDED,
    Limits,
    StepBuffers,
    StepShape,
    decode_shape,
    mixed_shape,
)
from gptj_serve.pipeline.gpu.step_plan import StepPlan, plan_step
from gptj_serve.pipeline.row_outputs import RowOutputs, in_order
from gptj_serve.steps import MicroBatch, Row, RowOutput, RowResult

DIFFERENTLY_CUT = (16, 32, 48)
"""Tokens of a step: 8-bit products have kernels of their own for about so many, besides those for more."""


class DeviceLayers(Protocol):
    """As `kernels.gpu.layers.GPULayers`."""

    @property
    def kernels(self) -> str: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def kv_cache_bytes(self) -> int: ...

    def run(self, hidden: Tensor, rows: DeviceRows) -> Tensor:
        """[T, D] → [T, D], in the same dtype."""

    def copy_blocks_at_once(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole KV blocks in every layer, all at once; both int64, on the device."""


class GPUStage:
    """Microbatches must come in order, from one thread at a time. What comes of them may be asked for in any."""

    def __init__(
        self,
        device: Device,
        stage: GPTJStage,
        layers: DeviceLayers,
        limits: Limits,
        sampler: Sampler,
        outputs: RowOutputs | None = None,
    ) -> None:
        """The last stage has `outputs`. Captures the graphs: the device must have room for them."""
        self._device = device
        self._stage = stage
        self._layers = layers
        self._limits = limits
        self._stream = device.stream()
        self._side = device.stream()  # of what rows ask for beside tokens, once their step is done
        self._buckets = DecodeBuckets(limits.max_rows, limits.max_blocks)
        self._buffers = StepBuffers(device, self._stream, limits)
        self._copies = Staging(device, self._stream, 2 * limits.num_kv_blocks, torch.int64)
        shape = (padded_tokens(limits.max_tokens), stage.config.n_embd)
        self._received = Staging(device, self._stream, 0 if stage.is_first else shape[0] * shape[1], limits.dtype)
        self._hidden = device.zeros(shape, limits.dtype)  # after the last layer, and on the last stage after ln_f
        self._handed_on = BufferPool(lambda: device.zeros(shape, limits.dtype))
        self._outputs = outputs
        self._graphs = Graphs(device, self._stream)
        self._sampling: SamplingSteps | None = None
        if outputs is not None:
            self._sampling = SamplingSteps(device, self._stream, self._graphs, stage, limits, sampler)
        self._last: GPUStep | None = None
        with torch.inference_mode():
            self._prepare()

    def _prepare(self) -> None:
        """Capture the graphs. Then run the largest of the other steps: kernels are compiled, and memory is there."""
        works: list[tuple[Hashable, Callable[[], object]]] = [
            (bucket, partial(self._compute, decode_shape(bucket))) for bucket in self._buckets.largest_first()
        ]
        if self._sampling is not None:
            works += self._sampling.works(self._buckets.row_sizes)
        self._graphs.capture(works)
        limits, row_tokens = self._limits, 1
        while row_tokens < limits.max_tokens:
            row_tokens = max(MIN_PADDED, 2 * row_tokens)
            self._run_mixed(limits.max_tokens, row_tokens)
        for num_tokens in DIFFERENTLY_CUT:
            if num_tokens < limits.max_tokens:
                self._run_mixed(num_tokens, MIN_PADDED)

    def _run_mixed(self, num_tokens: int, row_tokens: int) -> None:
        limits = self._limits
        shape = mixed_shape(num_tokens, limits.max_rows, row_tokens, limits.max_blocks, limits.max_rows)
        self._stream.run(partial(self._compute, shape))

    def synchronize(self) -> None:
        self._stream.record().wait()

    def restart(self) -> None:
        """Forget the last step."""
        self._last = None

    def begin(self, microbatch: MicroBatch, hidden: Tensor | DeviceHidden | None) -> GPUStep:
        """`hidden` [T, D] of the stage before, on the host or the device; None on the first stage.

        Raises `IndexError` for what lies outside of the model or of what the stage was made for, and `RuntimeError`
        for what goes wrong on the device, now or in an earlier step.
        """
        rows, fed_from = self._fed(microbatch.rows)
        sampling = self._sampling
        plan = plan_step(rows, self._buckets, None if sampling is None else sampling.can_sample)
        self._buffers.put(plan.shape, rows, plan.places, fed_from)
        if microbatch.block_copies:
            self._copy_blocks(microbatch.block_copies)
        if hidden is not None:
            self._receive(hidden, plan.num_tokens)
        if plan.bucket is not None:
            self._graphs.replay(plan.bucket)
        else:
            self._stream.launch(partial(self._compute, plan.shape))
        self._last = self._finish(microbatch.microbatch_id, rows, plan)
        return self._last

    def _fed(self, rows: Sequence[Row]) -> tuple[Sequence[Row], list[int]]:
        """Rows as they can be computed, and what each token is fed from, or nothing if all are known.

        Tokens that the host has chosen, since the device can't, are waited for.
        """
        if all(row.fed_from is None for row in rows):
            return rows, []
        assert self._last is not None, "a row is fed by a step that was not here"
        known, fed_from = list(rows), []
        for i, row in enumerate(rows):
            if row.fed_from is None:
                fed_from += [-1] * len(row.token_ids)
                continue
            place = self._last.first_place.get(row.fed_from, -1)
            fed_from.append(place)
            if place < 0 and (result := self._last.output().rows[row.fed_from]) is not None and result.tokens:
                known[i] = replace(row, token_ids=[result.tokens[0].token_id])
        return known, fed_from

    def _copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        pairs = simultaneous(copies)
        half, num_copies = self._copies.arrays[self._copies.begin()], len(pairs[0])
        half[: 2 * num_copies].reshape(2, num_copies)[:] = pairs
        sources, targets = self._copies.send(2 * num_copies).view(2, num_copies)
        self._stream.launch(lambda: self._layers.copy_blocks_at_once(sources, targets))

    def _receive(self, received: Tensor | DeviceHidden, num_tokens: int) -> None:
        num_elements = num_tokens * self._stage.config.n_embd
        if isinstance(received, DeviceHidden):
            self._stream.follow(received.ready)
            self._stream.copy(self._received.on_device[:num_elements], received.tensor.view(-1))
            received.give_back(self._stream.record())
        elif received.is_cuda:
            here = self._device.here()
            self._stream.follow(here.record())
            self._stream.copy(self._received.on_device[:num_elements], received.view(-1))
            here.follow(self._stream.record())  # whoever made it may overwrite it then
        else:
            half = self._received.halves[self._received.begin()]
            half[:num_elements].copy_(received.view(-1))
            self._received.send(num_elements)

    def _compute(self, shape: StepShape) -> None:
        """What a graph has: from the step's inputs to hidden states, and logits if any are asked for."""
        rows, fed_from, places = self._buffers.inputs(shape)
        num_tokens, width = shape.num_tokens, self._stage.config.n_embd
        if self._stage.is_first:
            token_ids = rows.token_ids
            if self._sampling is not None:
                fed = self._sampling.token_ids.index_select(0, fed_from.clamp(min=0))
                token_ids = torch.where(fed_from >= 0, fed, token_ids)
            hidden = F.embedding(token_ids, self._stage.wte.weight).to(self._limits.dtype)
        else:
            hidden = self._received.on_device[: num_tokens * width].view(num_tokens, width)
        hidden = self._layers.run(hidden, rows)
        if self._sampling is not None:
            hidden = self._stage.ln_f(hidden)
            if shape.num_places:
                self._sampling.set_logits(hidden if shape.max_row_tokens == 1 else hidden.index_select(0, places))
        self._hidden[:num_tokens].copy_(hidden)

    def _finish(self, microbatch_id: int, rows: Sequence[Row], plan: StepPlan) -> GPUStep:
        """What follows the layers."""
        outputs = self._outputs
        if outputs is None or self._sampling is None:
            handed_on = self._take_hidden(plan.num_tokens)
            done = self._stream.record()
            hidden = DeviceHidden(
                handed_on[: plan.num_tokens], done, lambda read: self._handed_on.give_back(handed_on, read)
            )
            return GPUStep(microbatch_id, done, hidden=hidden)
        sampled = None
        if plan.first_place:
            sampled = self._sampling.put(plan.shape.num_places, plan.specs, plan.positions)
        is_asked = any(_asks(row) for i, row in enumerate(rows) if i not in plan.first_place)
        buffer = self._take_hidden(plan.num_tokens) if is_asked else None
        done = self._stream.record()

        def results() -> list[RowResult | None]:
            made: list[RowResult | None] = [None] * len(rows)
            if buffer is not None:
                left = [replace(row, samples=[]) if i in plan.first_place else row for i, row in enumerate(rows)]
                self._side.follow(done)
                made = self._side.run(partial(outputs.of, left, buffer[: plan.num_tokens]))
                self._handed_on.give_back(buffer)
            elif sampled is None:
                done.wait()  # nobody asks for anything; but the step is over, or has failed, when its output is there
            chosen = [] if sampled is None else sampled()
            for i, place in plan.first_place.items():
                made[i] = in_order(chosen[place : place + len(rows[i].samples)])
            return made

        return GPUStep(microbatch_id, done, results=results, first_place=plan.first_place)

    def _take_hidden(self, num_tokens: int) -> Tensor:
        buffer = self._handed_on.take(self._stream)
        self._stream.copy(buffer[:num_tokens], self._hidden[:num_tokens])
        return buffer


def _asks(row: Row) -> bool:
    return bool(row.samples or row.target_token_ids) or row.output is not RowOutput.NOTHING
