"""From a request to its job, if this engine can ever finish it."""

from collections.abc import Callable

from gptj_serve.engine.beam_generation import BeamGeneration
from gptj_serve.engine.generation import Generation
from gptj_serve.engine.job import Job
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.logit_editor import TokenMatcher
from gptj_serve.engine.prefill_only import PrefillOnly
from gptj_serve.errors import InvalidRequestError
from gptj_serve.types import EngineRequest, Pooling, Task

MakeJob = Callable[[EngineRequest, int, frozenset[int], TokenMatcher | None, float], Job]
"""`make_job`, or what a simulation has in its place."""


def make_job(
    request: EngineRequest,
    block_size: int,
    eos_token_ids: frozenset[int],
    matcher: TokenMatcher | None,
    now: float,
) -> Job:
    sampling = request.sampling
    if sampling is None:
        return PrefillOnly(request, block_size)
    deadline = None if sampling.max_time_s is None else now + sampling.max_time_s
    make = Generation if sampling.beams is None else BeamGeneration
    return make(request, block_size, eos_token_ids, matcher, deadline)


def check_fits(request: EngineRequest, max_tokens: int, max_sequences: int, blocks: KVBlocks) -> None:
    """Raises `InvalidRequestError` for what can't be finished in a context of `max_tokens` over these blocks."""
    if request.task is Task.CLASSIFY and request.pooling is Pooling.ALL:
        raise InvalidRequestError("pooling", request.pooling.value, "gives classify no single state to look at")
    if (request.task is Task.SCORE) != bool(request.continuation_token_ids):
        raise InvalidRequestError("continuation_token_ids", request.continuation_token_ids, "go with task score")
    if (request.task is Task.GENERATE) != (request.sampling is not None):
        raise InvalidRequestError("sampling", request.task.value, "goes with task generate")
    num_prompt, num_new = len(request.prompt_token_ids), _num_new(request)
    limit = min(max_tokens, blocks.num_blocks * blocks.block_size)
    if num_prompt + num_new > limit:
        new_field = "max_new_tokens" if request.sampling is not None else "continuation_token_ids"
        raise InvalidRequestError(
            "prompt" if num_prompt > limit else new_field,
            num_prompt if num_prompt > limit else num_new,
            f"{num_prompt} prompt tokens + {num_new} new tokens exceed the limit of {limit}",
        )
    if request.sampling is None:
        return
    num_negative = len(request.sampling.negative_prompt_token_ids)
    if num_negative and request.sampling.guidance_scale == 1:
        raise InvalidRequestError("negative_prompt", num_negative, "goes with a guidance_scale other than 1")
    if num_negative + num_new > limit:
        raise InvalidRequestError(
            "negative_prompt", num_negative, f"{num_negative} tokens + {num_new} new tokens exceed the limit of {limit}"
        )
    lengths = [num_prompt + num_new] * (request.sampling.beams.num_beams if request.sampling.beams else 1)
    if request.sampling.guidance_scale != 1:
        lengths.append(max(1, num_negative) + num_new)
    if len(lengths) > max_sequences:
        field = "num_beams" if request.sampling.beams else "guidance_scale"
        raise InvalidRequestError(field, len(lengths), f"at most {max_sequences} sequences run at a time")
    if (num_needed := max_blocks(request, lengths, blocks)) > blocks.num_blocks:
        raise InvalidRequestError(
            "max_new_tokens",
            num_new,
            f"{len(lengths)} sequences may need {num_needed} KV blocks; there are {blocks.num_blocks}",
        )


def max_blocks(request: EngineRequest, lengths: list[int], blocks: KVBlocks) -> int:
    """KV blocks for sequences of these lengths; beams share the whole blocks of the prompt at least."""
    needed = sum(map(blocks.blocks_for, lengths))
    if request.sampling is None or request.sampling.beams is None or not blocks.reuse_prefixes:
        return needed
    return needed - (len(lengths) - 1) * (len(request.prompt_token_ids) // blocks.block_size)


def _num_new(request: EngineRequest) -> int:
    num_sampled = request.sampling.max_new_tokens if request.sampling is not None else 0
    return num_sampled + len(request.continuation_token_ids)
