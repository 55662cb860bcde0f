"""`generate`: the engine and sampler of the service, over the model's own layers, in this process.

Rows are sequences of one engine: each gets the tokens that it gets alone, whatever it shares the batch with.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor, nn

from gptj_serve.errors import InvalidOptionError, InvalidRequestError
from gptj_serve.modeling.generation_config import GenerationConfig, as_list
from gptj_serve.modeling.generation_inputs import GenerationInputs, Prompts, read_prompts
from gptj_serve.modeling.generation_outputs import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    padded,
    sequences_of,
)
from gptj_serve.modeling.generation_params import as_option_error, check_options, sampling_params
from gptj_serve.modeling.generation_run import Answer, Streamer, run, sampling_of
from gptj_serve.modeling.generation_scores import step_logits, step_scores
from gptj_serve.modeling.stop_strings import Decoder, StopStrings
from gptj_serve.types import EngineRequest, SamplingParams, Task

if TYPE_CHECKING:
    from gptj_serve.modeling.heads import GPTJForCausalLM


NO_BEAM: Answer = ([], -1e9)
"""In the place of a hypothesis that the constraints don't allow; the score is transformers'."""


def generate(
    model: "GPTJForCausalLM",
    inputs: GenerationInputs,
    chosen: GenerationConfig,
    tokenizer: Decoder | None,
    streamer: Streamer | None,
) -> Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
    """See `GPTJForCausalLM.generate`."""
    prompts = read_prompts(inputs, chosen, model.config.vocab_size, model.device)
    sampling = sampling_params(chosen, model.config, prompts.input_ids.shape[1])
    requests = _requests(prompts, sampling, 1 if sampling.beams is not None else chosen.num_return_sequences or 1)
    check_options(chosen, sampling_of(requests[0]), model.config.vocab_size, is_streamed=streamer is not None)
    stop_strings = _stop_strings(chosen, tokenizer)
    if streamer is not None:
        if len(requests) > 1:
            raise InvalidOptionError("streamer", streamer, f"takes the tokens of one answer, not of {len(requests)}")
        streamer.put(prompts.input_ids.cpu())
    with _in_eval_mode(model):
        try:
            answers = run(model, requests, frozenset(chosen.end_token_ids), stop_strings, streamer)
        except InvalidRequestError as error:
            raise as_option_error(error) from None
        output = _output(model, prompts, requests, answers, chosen)
    if streamer is not None:
        streamer.end()
    return output


def _requests(prompts: Prompts, shared: SamplingParams, num_each: int) -> list[EngineRequest]:
    """One for each answer, or each beam search, in the order of the output; request i draws with seed + i."""
    rows = [pair for pair in zip(prompts.rows, prompts.negative_rows, strict=True) for _ in range(num_each)]
    return [
        EngineRequest(
            request_id=str(index),
            task=Task.GENERATE,
            prompt_token_ids=prompt,
            sampling=msgspec.structs.replace(
                shared, seed=(shared.seed + index) % 2**63, negative_prompt_token_ids=negative
            ),
        )
        for index, (prompt, negative) in enumerate(rows)
    ]


def _stop_strings(chosen: GenerationConfig, tokenizer: Decoder | None) -> StopStrings | None:
    if chosen.stop_strings is None:
        return None
    if tokenizer is None:
        raise InvalidOptionError("stop_strings", chosen.stop_strings, "needs generate(…, tokenizer=tokenizer)")
    return StopStrings(as_list(chosen.stop_strings), tokenizer)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _output(
    model: "GPTJForCausalLM",
    prompts: Prompts,
    requests: Sequence[EngineRequest],
    answers: list[list[Answer]],
    chosen: GenerationConfig,
) -> Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
    beams = sampling_of(requests[0]).beams
    num_each = beams.num_return_sequences if beams is not None else 1
    filled = [of_request + [NO_BEAM] * (num_each - len(of_request)) for of_request in answers]
    flat = [answer for of_request in filled for answer in of_request]
    pad = chosen.pad_token_id if chosen.pad_token_id is not None else next(iter(chosen.end_token_ids), 0)
    outputs = padded([token_ids for token_ids, _ in flat], pad)
    sequences = sequences_of(prompts.input_ids, outputs)
    if not chosen.return_dict_in_generate:
        return sequences
    if beams is not None:
        beam_scores = torch.tensor([score for _, score in flat], device=sequences.device)
        return GenerateBeamDecoderOnlyOutput(sequences, beam_scores if chosen.output_scores else None)
    return _with_steps(model, requests, outputs, chosen, sequences)


def _with_steps(
    model: "GPTJForCausalLM",
    requests: Sequence[EngineRequest],
    outputs: list[list[int]],
    chosen: GenerationConfig,
    sequences: Tensor,
) -> GenerateDecoderOnlyOutput:
    """With scores and logits, as far as they are asked for."""
    result = GenerateDecoderOnlyOutput(sequences)
    if not chosen.output_scores and not chosen.output_logits:
        return result
    pairs = list(zip(requests, outputs, strict=True))
    logits = [step_logits(model, request.prompt_token_ids, output) for request, output in pairs]
    if chosen.output_scores:
        ends = frozenset(chosen.end_token_ids)
        scores = [step_scores(model, *pair, ends, own) for pair, own in zip(pairs, logits, strict=True)]
        steps = torch.stack(scores, dim=1)  # [S, B, V]
        result.scores = (steps.log_softmax(dim=-1) if chosen.renormalize_logits else steps).unbind()
    if chosen.output_logits:
        result.logits = torch.stack(logits, dim=1).unbind()
    return result
