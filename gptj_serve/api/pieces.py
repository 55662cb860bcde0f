"""The choices that a plan asks for, whole or in pieces: what they say, not yet in any route's shape."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from gptj_serve.api.completion_plan import Candidate, Plan
from gptj_serve.api.generation import generate, score_prompt, search_beams
from gptj_serve.api.logprobs import ScoredToken, mean_logprob, scored_prompt
from gptj_serve.api.service import Service, run_all
from gptj_serve.api.streaming import merged
from gptj_serve.types import FinishReason

_Prompts = Sequence[asyncio.Future[list[ScoredToken]]]
"""For each prompt its scored tokens, which its first candidate brings and the others wait for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a choice, or all of it: its text with the tokens that it comes of."""

    text: str
    prompt: Sequence[ScoredToken]  # the prompt's tokens, with the first piece, if they are scored
    tokens: Sequence[ScoredToken]
    finish_reason: FinishReason | None


async def whole_choices(service: Service, plan: Plan) -> tuple[list[Piece], int]:
    """The choices, in the order of the prompts, of each prompt the best first if more were made than are wanted; and
    the number of tokens generated for them, also for those that were not chosen."""
    body = plan.body
    if body.use_beam_search:
        made = await run_all([_beams(service, plan, candidate) for candidate in plan.candidates])
    else:
        prompts = _prompts(plan)
        pieces = await run_all([_whole(service, plan, candidate, prompts) for candidate in plan.candidates])
        made = [pieces[i : i + body.num_candidates] for i in range(0, len(pieces), body.num_candidates)]
    chosen: list[Piece] = []
    for group in made:
        if len(group) > body.num_choices:
            group.sort(key=lambda piece: -mean_logprob(piece.tokens))
        chosen += group[: body.num_choices]
    return chosen, sum(len(piece.tokens) for group in made for piece in group)


async def stream_choices(service: Service, plan: Plan) -> AsyncGenerator[tuple[int, Piece]]:
    """Each piece with its choice's index, as they come."""
    prompts = _prompts(plan)
    async with aclosing(merged([_pieces(service, plan, candidate, prompts) for candidate in plan.candidates])) as all_:
        async for index, piece in all_:
            yield index, piece


def said(plan: Plan, piece: Piece) -> Sequence[ScoredToken]:
    """The tokens whose text the client gets."""
    return [*piece.prompt, *piece.tokens] if plan.echo else piece.tokens


def _prompts(plan: Plan) -> _Prompts:
    loop = asyncio.get_running_loop()
    return [loop.create_future() for _ in {candidate.prompt_index for candidate in plan.candidates}]


async def _pieces(service: Service, plan: Plan, candidate: Candidate, prompts: _Prompts) -> AsyncGenerator[Piece]:
    """With `echo` the prompt comes before the first token, or alone if no token is wanted."""
    text = _echo(service, plan, candidate)
    prompt: Sequence[ScoredToken] = []
    tokens: list[ScoredToken] = []
    known = prompts[candidate.prompt_index]
    if plan.num_new_tokens == 0:
        if plan.scores_prompts and candidate.scores_prompt:
            scores = await score_prompt(service, candidate.token_ids, plan.num_top_logprobs, candidate.params)
            known.set_result(scored_prompt(service.tokenizer, candidate.token_ids, scores))
        yield Piece(text, await known if plan.scores_prompts else [], tokens, FinishReason.LENGTH)
        return
    async with aclosing(generate(service, candidate.token_ids, candidate.params)) as chunks:
        async for chunk in chunks:
            if chunk.is_first and plan.scores_prompts:
                if candidate.scores_prompt:
                    known.set_result(scored_prompt(service.tokenizer, candidate.token_ids, chunk.prompt_scores))
                prompt = await known
            text += chunk.text
            tokens.append(chunk.token)
            if text or chunk.finish_reason is not None:
                yield Piece(text, prompt, tokens, chunk.finish_reason)
                text, prompt, tokens = "", [], []


async def _whole(service: Service, plan: Plan, candidate: Candidate, prompts: _Prompts) -> Piece:
    async with aclosing(_pieces(service, plan, candidate, prompts)) as stream:
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
    return service.tokenizer.decode(candidate.token_ids, skip_special_tokens=False) if plan.echo else ""
