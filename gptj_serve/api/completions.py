"""`/v1/completions` in OpenAI's shape, whole or in pieces."""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from gptj_serve.api.completion_plan import Plan
from gptj_serve.api.logprobs import openai_logprobs, vllm_prompt_logprobs
from gptj_serve.api.openai_responses import Completion, CompletionChoice, CompletionChunk, FinishReasonName
from gptj_serve.api.openai_streams import choices_and_usage, usage_of
from gptj_serve.api.pieces import Piece, said, stream_choices, whole_choices
from gptj_serve.api.resumption import AnswerStream, ChoiceEvent
from gptj_serve.api.service import Service
from gptj_serve.types import FinishReason

FINISH_REASONS: dict[FinishReason, FinishReasonName] = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TIME: "length",
}


async def complete(service: Service, plan: Plan) -> Completion:
    pieces, num_tokens = await whole_choices(service, plan)
    return {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.config.served_name,
        "choices": [_choice(service, plan, index, piece, 0) for index, piece in enumerate(pieces)],
        "usage": usage_of(plan, num_tokens),
    }


async def stream_completion(
    service: Service, plan: Plan, answer: AnswerStream | None = None
) -> AsyncGenerator[CompletionChunk]:
    """A chunk per piece of any choice, as they come; the usage, if wanted, after all of them. What was sent is not."""
    answer = answer or AnswerStream()
    async with aclosing(choices_and_usage(plan, answer, _choice_events(service, plan))) as parts:
        async for choices, usage in parts:
            chunk: CompletionChunk = {
                "id": f"cmpl-{answer.key}",
                "object": "text_completion",
                "created": answer.created,
                "model": service.config.served_name,
                "choices": choices,
            }
            if plan.body.includes_usage:
                chunk["usage"] = usage
            yield chunk


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


async def _choice_events(service: Service, plan: Plan) -> AsyncGenerator[ChoiceEvent[CompletionChoice]]:
    offsets = [0] * len(plan.candidates)
    async with aclosing(stream_choices(service, plan)) as pieces:
        async for index, piece in pieces:
            token_ids = [token.token_id for token in piece.tokens]
            yield ChoiceEvent(index, _choice(service, plan, index, piece, offsets[index]), token_ids)
            offsets[index] += sum(len(token.text) for token in said(plan, piece))


def _choice(service: Service, plan: Plan, index: int, piece: Piece, text_offset: int) -> CompletionChoice:
    body = plan.body
    choice: CompletionChoice = {
        "index": index,
        "text": piece.text,
        "logprobs": None,
        "finish_reason": None if piece.finish_reason is None else FINISH_REASONS[piece.finish_reason],
    }
    if plan.num_shown_logprobs is not None:
        tokens = said(plan, piece)
        choice["logprobs"] = openai_logprobs(service.tokenizer, tokens, plan.num_shown_logprobs, text_offset)
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = vllm_prompt_logprobs(service.tokenizer, piece.prompt, body.prompt_logprobs)
    if body.return_token_ids:
        choice["token_ids"] = [token.token_id for token in piece.tokens]
    return choice
