"""`generate`: the engine and sampler of the service, over the model's own layers, in this process.

Rows are sequences of one engine: each gets the tokens that it gets alone, whatever it shares the batch with.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.errors import RequestFailedError
from gptj_serve.model.config import GPTJConfig
from gptj_serve.model.stage import GPTJStage
from gptj_serve.modeling.generation_config import DEFAULT_NEW_TOKENS, GenerationConfig
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.types import EngineRequest, FailureEvent, SamplingParams, Task, TokenEvent

if TYPE_CHECKING:
    from gptj_serve.modeling.heads import GPTJForCausalLM

logger = logging.getLogger(__name__)

_BLOCK_SIZE = 16
_MAX_MICROBATCH_TOKENS = 2048


class Decoder(Protocol):
    def decode(self, token_ids: list[int]) -> str: ...


def generate(
    model: "GPTJForCausalLM",
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    generation_config: GenerationConfig | None,
    tokenizer: Decoder | None,
    options: dict[str, Any],
) -> Tensor:
    """See `GPTJForCausalLM.generate`."""
    chosen = (generation_config or model.generation_config).changed(**options)
    if input_ids is None:
        if chosen.bos_token_id is None:
            raise ValueError("generate() needs input_ids: the model has no bos_token_id to begin with")
        input_ids = torch.tensor([[chosen.bos_token_id]], device=model.device)
    if input_ids.dim() != 2 or input_ids.is_floating_point() or not input_ids.numel():
        raise ValueError(f"input_ids must be token ids [B, T], not {input_ids.dtype} {list(input_ids.shape)}")
    if not 0 <= input_ids.min() <= input_ids.max() < model.config.vocab_size:
        raise IndexError(f"input_ids holds ids outside [0, vocab_size={model.config.vocab_size})")
    if chosen.stop_strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: generate(…, tokenizer=tokenizer)")
    prompts = _prompts(input_ids, attention_mask, chosen)
    requests = _requests(prompts, _sampling(chosen, model.config, input_ids.shape[1]), chosen)
    is_stopped = _stop_check(chosen.stop_strings, tokenizer)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        outputs = _run(_generate(model, requests, frozenset(chosen.eos_token_id or []), is_stopped))
    finally:
        for module, mode in modes:
            module.training = mode
    return _padded(input_ids, outputs, chosen)


def _prompts(input_ids: Tensor, attention_mask: Tensor | None, chosen: GenerationConfig) -> list[list[int]]:
    """The visible tokens of each row. Without a mask, padding shows if the pad token is no end token (transformers)."""
    if attention_mask is None:
        pad = chosen.pad_token_id
        hidden_id = -1 if pad is None or pad in (chosen.eos_token_id or []) else pad
        attention_mask = input_ids != hidden_id
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}")
    rows = zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
    prompts = [[token_id for token_id, is_visible in zip(*row, strict=True) if is_visible] for row in rows]
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"row {index} of input_ids holds nothing but padding")
    return prompts


def _sampling(chosen: GenerationConfig, config: GPTJConfig, num_prompt: int) -> SamplingParams:
    """Lengths as transformers counts them, padding included; all rows share them."""
    if chosen.max_new_tokens is not None:
        max_new = chosen.max_new_tokens
        if chosen.max_length is not None:
            logger.warning("both max_new_tokens and max_length are given: max_new_tokens counts")
    elif chosen.max_length is not None:
        max_new = chosen.max_length - num_prompt
    else:
        max_new = min(DEFAULT_NEW_TOKENS, config.n_positions - num_prompt)
    if max_new < 1:
        raise ValueError(
            f"the prompt has {num_prompt} tokens, which leaves no room for new ones: "
            f"max_length={chosen.max_length}, n_positions={config.n_positions}"
        )
    min_new = chosen.min_new_tokens
    if min_new is None:
        min_new = max((chosen.min_length or 0) - num_prompt, 0)
    if not chosen.do_sample:
        if chosen.num_return_sequences > 1:
            raise ValueError(
                f"num_return_sequences={chosen.num_return_sequences}: greedy answers are all the same; set do_sample"
            )
        return SamplingParams(max_new_tokens=max_new, min_new_tokens=min_new)
    seed = int(torch.randint(2**62, ())) if chosen.seed is None else chosen.seed
    return SamplingParams(
        max_new_tokens=max_new,
        min_new_tokens=min_new,
        temperature=1.0 if chosen.temperature is None else chosen.temperature,
        top_k=chosen.top_k or 0,
        top_p=1.0 if chosen.top_p is None else chosen.top_p,
        seed=seed,
    )


def _requests(prompts: list[list[int]], shared: SamplingParams, chosen: GenerationConfig) -> list[EngineRequest]:
    """One for each answer, in the order of the output; answer i draws with seed + i."""
    repeated = [prompt for prompt in prompts for _ in range(chosen.num_return_sequences)]
    values = {name: getattr(shared, name) for name in shared.__struct_fields__}
    return [
        EngineRequest(
            request_id=str(index),
            task=Task.GENERATE,
            prompt_token_ids=prompt,
            sampling=SamplingParams(**{**values, "seed": (shared.seed + index) % 2**63}),
        )
        for index, prompt in enumerate(repeated)
    ]


def _stop_check(stop_strings: list[str] | None, tokenizer: Decoder | None) -> Callable[[list[int]], bool]:
    if not stop_strings or tokenizer is None:
        return lambda token_ids: False
    decoder = tokenizer
    return lambda token_ids: any(stop in decoder.decode(token_ids) for stop in stop_strings)


def _run(work: Coroutine[Any, Any, list[list[int]]]) -> list[list[int]]:
    """Run to the end, also for a caller inside an event loop: then on a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, thread_name_prefix="generate") as thread:
        return thread.submit(asyncio.run, work).result()


async def _generate(
    model: "GPTJForCausalLM",
    requests: list[EngineRequest],
    eos_token_ids: frozenset[int],
    is_stopped: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Each request's new tokens."""
    lengths = [len(r.prompt_token_ids) + r.sampling.max_new_tokens for r in requests if r.sampling is not None]
    limits = SchedulerLimits(1, len(requests), _MAX_MICROBATCH_TOKENS, model.config.n_positions)
    num_blocks = sum(-(-min(length, model.config.n_positions) // _BLOCK_SIZE) for length in lengths)
    spec = StageSpec(
        range(model.config.n_layer), num_blocks, _BLOCK_SIZE, model.dtype, model.device, model.config.vocab_size
    )
    pipeline = InProcessPipeline([StageRunner(_stage_of(model), spec)])

    async def answer(request: EngineRequest) -> list[int]:
        token_ids: list[int] = []
        stream = engine.submit(request)
        async for event in stream:
            if isinstance(event, FailureEvent):
                raise RequestFailedError(event.message)
            if isinstance(event, TokenEvent):
                token_ids.append(event.token_id)
                if is_stopped(token_ids):
                    break
        await stream.aclose()
        return token_ids

    try:
        async with LocalEngine(Scheduler(limits, KVBlocks(num_blocks, _BLOCK_SIZE), eos_token_ids), pipeline) as engine:
            return await asyncio.gather(*map(answer, requests))
    finally:
        pipeline.close()


def _stage_of(model: "GPTJForCausalLM") -> GPTJStage:
    """The whole model as one stage. It holds the model's own modules: nothing is copied."""
    with torch.device("meta"):
        stage = GPTJStage(model.config, range(model.config.n_layer), ("lm_head",))
    backbone = model.transformer
    stage.wte, stage.ln_f, stage.lm_head, stage.rotary = backbone.wte, backbone.ln_f, model.lm_head, backbone.rotary
    stage.h = nn.ModuleDict({str(layer): block for layer, block in enumerate(backbone.h)})
    return stage


def _padded(input_ids: Tensor, outputs: list[list[int]], chosen: GenerationConfig) -> Tensor:
    pad = chosen.pad_token_id if chosen.pad_token_id is not None else (chosen.eos_token_id or [0])[0]
    longest = max(map(len, outputs))
    new = torch.tensor([[*tokens, *[pad] * (longest - len(tokens))] for tokens in outputs], device=input_ids.device)
    return torch.cat([input_ids.repeat_interleave(chosen.num_return_sequences, dim=0), new.to(input_ids.dtype)], dim=1)
