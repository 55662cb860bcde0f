"""The engine of the service over a model's own layers, in this process, for the requests of one call."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.errors import RequestFailedError
from gptj_serve.model.stage import GPTJStage
from gptj_serve.modeling.stop_strings import StopStrings
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.types import BeamEvent, EngineRequest, FailureEvent, SamplingParams, TokenEvent

if TYPE_CHECKING:
    from gptj_serve.modeling.heads import GPTJForCausalLM

_BLOCK_SIZE = 16
_MAX_MICROBATCH_TOKENS = 2048

Answer = tuple[list[int], float]
"""New tokens, and of a beam its score."""


class Streamer(Protocol):
    """transformers' `BaseStreamer`."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


def run(
    model: "GPTJForCausalLM",
    requests: Sequence[EngineRequest],
    eos_token_ids: frozenset[int],
    stop_strings: StopStrings | None,
    streamer: Streamer | None,
) -> list[list[Answer]]:
    """Each request's answers: one, or the beams that were asked for. All requests have the same sampling parameters.

    Also for a caller inside an event loop: then on a thread of its own. Raises `RequestFailedError` if one of them
    could not be finished, and `InvalidRequestError` if it does not fit the model's context.
    """
    work = _run(model, requests, eos_token_ids, stop_strings, streamer)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, thread_name_prefix="generate") as thread:
        return thread.submit(asyncio.run, work).result()


async def _run(
    model: "GPTJForCausalLM",
    requests: Sequence[EngineRequest],
    eos_token_ids: frozenset[int],
    stop_strings: StopStrings | None,
    streamer: Streamer | None,
) -> list[list[Answer]]:
    config = model.config
    num_sequences = sum(_width(request) for request in requests)
    limits = SchedulerLimits(1, num_sequences, _MAX_MICROBATCH_TOKENS, config.n_positions)
    blocks = KVBlocks(_num_blocks(requests, config.n_positions), _BLOCK_SIZE)
    spec = StageSpec(
        range(config.n_layer), blocks.num_blocks, _BLOCK_SIZE, model.dtype, model.device, config.vocab_size
    )
    pipeline = InProcessPipeline([StageRunner(WholeModel(model), spec)])
    try:
        async with LocalEngine(Scheduler(limits, blocks, eos_token_ids), pipeline) as engine:
            answers = (_answers(engine, request, stop_strings, streamer) for request in requests)
            return await asyncio.gather(*answers)
    finally:
        pipeline.close()


async def _answers(
    engine: LocalEngine, request: EngineRequest, stop_strings: StopStrings | None, streamer: Streamer | None
) -> list[Answer]:
    token_ids = request.prompt_token_ids.copy()
    async with aclosing(engine.submit(request)) as events:
        async for event in events:
            if isinstance(event, FailureEvent):
                raise RequestFailedError(event.message)
            if isinstance(event, BeamEvent):
                return [(beam.token_ids, beam.score) for beam in event.beams]
            if isinstance(event, TokenEvent):
                token_ids.append(event.token_id)
                if streamer is not None:
                    streamer.put(torch.tensor([event.token_id]))
                if stop_strings and stop_strings.are_completed_by_last(token_ids):
                    break
    return [(token_ids[len(request.prompt_token_ids) :], 0.0)]


def sampling_of(request: EngineRequest) -> SamplingParams:
    assert request.sampling is not None
    return request.sampling


def _width(request: EngineRequest) -> int:
    """The most sequences that it has at a time."""
    sampling = sampling_of(request)
    return sampling.beams.num_beams if sampling.beams is not None else 1 + (sampling.guidance_scale != 1)


def _num_blocks(requests: Sequence[EngineRequest], n_positions: int) -> int:
    """Enough for all of them at once, if equal prompts, and the beams of one prompt, share the blocks of it."""

    def blocks_for(num_prompt: int, num_new: int) -> int:
        return -(-min(num_prompt + num_new, n_positions) // _BLOCK_SIZE)

    shared = {tuple(request.prompt_token_ids): len(request.prompt_token_ids) // _BLOCK_SIZE for request in requests}
    num_blocks = sum(shared.values())
    for request in requests:
        sampling, prompt = sampling_of(request), request.prompt_token_ids
        num_beams = sampling.beams.num_beams if sampling.beams is not None else 1
        num_blocks += num_beams * (blocks_for(len(prompt), sampling.max_new_tokens) - shared[tuple(prompt)])
        if sampling.guidance_scale != 1:
            num_blocks += blocks_for(len(sampling.negative_prompt_token_ids) or 1, sampling.max_new_tokens)
        num_blocks += _width(request)  # to be copied to, and since the scheduler keeps as many free
    return num_blocks


class WholeModel(GPTJStage):
    """A model as the only stage. It holds the model's own modules: nothing is copied, nor made anew."""

    def __init__(self, model: "GPTJForCausalLM") -> None:
        nn.Module.__init__(self)
        self.config, self.span = model.config, range(model.config.n_layer)
        self.is_first = self.is_last = True
        backbone = model.transformer
        self.wte, self.ln_f, self.lm_head, self.rotary = backbone.wte, backbone.ln_f, model.lm_head, backbone.rotary
        self.h = nn.ModuleDict({str(layer): block for layer, block in enumerate(backbone.h)})
