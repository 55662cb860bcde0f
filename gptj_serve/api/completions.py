"""Completions in OpenAI's shape: which sequences a request asks for, and what is said of them, whole or in pieces."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from gptj_serve.api.completion_plan import Candidate, Plan
from gptj_serve.api.generation import generate, score_prompt, search_beams
from gptj_serve.api.logprobs import ScoredToken, mean_logprob, openai_logprobs, scored_prompt, vllm_prompt_logprobs
from gptj_serve.api.service import Service, run_all
from gptj_serve.api.streaming import merged
from gptj_serve.types import FinishReason

_FINISH_REASONS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TIME: "length",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a choice, or all of it: its text with the tokens that it comes of."""

    text: str
    prompt: Sequence[ScoredToken]  # the prompt's tokens, with the first piece, if they are scored
    tokens: Sequence[ScoredToken]
    finish_reason: FinishReason | None


async def complete(service: Service, plan: Plan) -> dict[str, Any]:
    """The choices, in the order of the prompts, of each prompt the best first if there were more; and the usage."""
    body = plan.body
    if body.use_beam_search:
        made = await run_all([_beams(service, plan, candidate) for candidate in plan.candidates])
    else:
        pieces = await run_all([_whole(service, plan, candidate) for candidate in plan.candidates])
        made = [pieces[i : i + body.num_candidates] for i in range(0, len(pieces), body.num_candidates)]
    chosen: list[Piece] = []
    for group in made:
        if len(group) > body.num_choices:
            group.sort(key=lambda piece: -mean_logprob(piece.tokens))
        chosen += group[: body.num_choices]
    num_completion_tokens = sum(len(piece.tokens) for group in made for piece in group)
    choices = [_choice(service, plan, index, piece, 0) for index, piece in enumerate(chosen)]
    return {"choices": choices, "usage": _usage(plan, num_completion_tokens)}


async def stream_pieces(service: Service, plan: Plan) -> AsyncGenerator[dict[str, Any]]:
    """A part of the answer per piece of any choice, as they come; the usage, if wanted, after all of them."""
    options = plan.body.stream_options
    include_usage = options is not None and options.include_usage
    no_usage = {"usage": None} if include_usage else {}
    num_completion_tokens = 0
    offsets = [0] * len(plan.candidates)
    async with aclosing(merged([_pieces(service, plan, candidate) for candidate in plan.candidates])) as stream:
        async for index, piece in stream:
            num_completion_tokens += len(piece.tokens)
            yield {"choices": [_choice(service, plan, index, piece, offsets[index])]} | no_usage
            offsets[index] += sum(len(token.text) for token in _said(plan, piece))
    if include_usage:
        yield {"choices": [], "usage": _usage(plan, num_completion_tokens)}


async def _pieces(service: Service, plan: Plan, candidate: Candidate) -> AsyncGenerator[Piece]:
    """With `echo` the prompt comes before the first token, or alone if no token is wanted."""
    text = _echo(service, plan, candidate)
    prompt: Sequence[ScoredToken] = []
    tokens: list[ScoredToken] = []
    if plan.body.num_new_tokens == 0:
        if plan.scores_prompts:
            scores = await score_prompt(service, candidate.token_ids, plan.num_top_logprobs, candidate.params)
            prompt = scored_prompt(service.tokenizer, candidate.token_ids, scores)
        yield Piece(text, prompt, tokens, FinishReason.LENGTH)
        return
    async with aclosing(generate(service, candidate.token_ids, candidate.params)) as chunks:
        async for chunk in chunks:
            if chunk.is_first and plan.scores_prompts:
                prompt = scored_prompt(service.tokenizer, candidate.token_ids, chunk.prompt_scores)
            text += chunk.text
            tokens.append(chunk.token)
            if text or chunk.finish_reason is not None:
                yield Piece(text, prompt, tokens, chunk.finish_reason)
                text, prompt, tokens = "", [], []


async def _whole(service: Service, plan: Plan, candidate: Candidate) -> Piece:
    async with aclosing(_pieces(service, plan, candidate)) as stream:
        pieces = [piece async for piece in stream]
    return Piece(
        "".join(piece.text for piece in pieces),
        pieces[0].prompt,
        [token for piece in pieces for token in piece.tokens],
        pieces[-1].finish_reason,
    )


async def _beams(service: Service, plan: Plan, candidate: Candidate) -> list[Piece]:
    prompt_text = _echo(service, plan, candidate)
    beams = await search_beams(service, candidate.token_ids, candidate.params)
    return [Piece(prompt_text + beam.text, [], beam.tokens, beam.finish_reason) for beam in beams]


def _echo(service: Service, plan: Plan, candidate: Candidate) -> str:
    """The prompt as the model saw it."""
    return service.tokenizer.decode(candidate.token_ids, skip_special_tokens=False) if plan.body.echo else ""


def _said(plan: Plan, piece: Piece) -> Sequence[ScoredToken]:
    """The tokens whose text the client gets."""
    return [*piece.prompt, *piece.tokens] if plan.body.echo else piece.tokens


def _choice(service: Service, plan: Plan, index: int, piece: Piece, text_offset: int) -> dict[str, Any]:
    body = plan.body
    choice: dict[str, Any] = {"index": index, "text": piece.text, "logprobs": None, "finish_reason": None}
    if piece.finish_reason is not None:
        choice["finish_reason"] = _FINISH_REASONS[piece.finish_reason]
    if body.logprobs is not None:
        tokens = _said(plan, piece)
        choice["logprobs"] = openai_logprobs(service.tokenizer, tokens, body.logprobs, text_offset)
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = vllm_prompt_logprobs(service.tokenizer, piece.prompt, body.prompt_logprobs)
    if body.return_token_ids:
        choice["token_ids"] = [token.token_id for token in piece.tokens]
    return choice


def _usage(plan: Plan, num_completion_tokens: int) -> dict[str, int]:
    """All that was generated counts, also what `best_of` did not choose."""
    return {
        "prompt_tokens": plan.num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": plan.num_prompt_tokens + num_completion_tokens,
    }
