"""Chats: messages as a prompt, and `/v1/chat/completions` in OpenAI's shape, whole or in pieces."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from gptj_serve.api.chat_schemas import ChatCompletionRequest, ChatMessage, ChatPrompt
from gptj_serve.api.completion_plan import Plan, candidates_of, check_choices, sampling_of
from gptj_serve.api.completions import FINISH_REASONS, new_id
from gptj_serve.api.logprobs import chat_logprobs, vllm_prompt_logprobs
from gptj_serve.api.openai_responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
)
from gptj_serve.api.openai_streams import choices_and_usage, usage_of
from gptj_serve.api.pieces import Piece, stream_choices, whole_choices
from gptj_serve.api.resumption import AnswerStream, ChoiceEvent
from gptj_serve.api.service import MAX_CHARACTERS_ON_LOOP, Service, off_loop
from gptj_serve.errors import InvalidRequestError

_NAMES = {
    "min_new_tokens": "min_tokens",
    "num_top_logprobs": "top_logprobs",
    "num_beams": "n",
    "num_return_sequences": "n",
}


async def make_chat_plan(service: Service, body: ChatCompletionRequest) -> Plan:
    """Check the whole request before any of it is started."""
    service.require_head("lm_head", "generation")
    _check(body)
    check_choices(service, body, 1, "n")
    length_field, limit = body.new_token_limit
    prompt = await chat_prompt(service, body.messages, body, is_truncated=body.truncate_prompt_tokens is not None)
    token_ids = await service.encode_prompt(
        prompt, 1 if limit is None else limit, "messages", length_field, num_kept=body.truncate_prompt_tokens
    )
    num_new_tokens = service.model.n_positions - len(token_ids) if limit is None else limit
    num_shown_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    num_top_logprobs = max(num_shown_logprobs or 0, body.prompt_logprobs or 0)
    scores_prompts = body.prompt_logprobs is not None
    params = await sampling_of(
        service,
        body,
        num_new_tokens,
        {**_NAMES, "max_new_tokens": length_field},
        num_top_logprobs=num_top_logprobs,
        scores_prompts=scores_prompts,
    )
    return Plan(
        body,
        candidates_of(body, [token_ids], params),
        num_prompt_tokens=len(token_ids),
        num_new_tokens=num_new_tokens,
        num_top_logprobs=num_top_logprobs,
        num_shown_logprobs=num_shown_logprobs,
        scores_prompts=scores_prompts,
    )


async def chat_prompt(
    service: Service, messages: Sequence[ChatMessage], how: ChatPrompt, *, is_truncated: bool = False
) -> str:
    """The messages through the chat template. Raises `InvalidRequestError`, also if there is none."""
    template = service.chat_template
    if template is None:
        reason = (
            f"{service.config.served_name!r} has no chat template: set chat_template in the deployment's configuration "
            "to a Jinja file, or use /v1/completions"
        )
        raise InvalidRequestError("messages", f"{len(messages)} messages", reason)
    if how.continue_final_message and how.add_generation_prompt:
        raise InvalidRequestError("add_generation_prompt", True, "does not go with continue_final_message")
    adds_prompt = not how.continue_final_message if how.add_generation_prompt is None else how.add_generation_prompt
    chat = [message.for_template for message in messages]
    num_characters = sum(len(text) for message in chat for text in message.values())
    if how.chat_template_kwargs:  # how long a template takes with those, their size doesn't say
        num_characters += MAX_CHARACTERS_ON_LOOP
    longest = service.model.n_positions * service.tokenizer.max_token_bytes

    def render() -> str:
        return template.render(
            chat,
            how.chat_template_kwargs or {},
            add_generation_prompt=adds_prompt,
            continue_final_message=how.continue_final_message,
            max_characters=service.config.ingress.max_body_bytes if is_truncated else longest,
        )

    return await off_loop(num_characters, render)


async def complete_chat(service: Service, plan: Plan) -> ChatCompletion:
    pieces, num_tokens = await whole_choices(service, plan)
    answer: ChatCompletion = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": service.config.served_name,
        "choices": [_choice(service, plan, index, piece) for index, piece in enumerate(pieces)],
        "usage": usage_of(plan, num_tokens),
    }
    if plan.body.prompt_logprobs is not None:
        scores = vllm_prompt_logprobs(service.tokenizer, pieces[0].prompt, plan.body.prompt_logprobs)
        answer["prompt_logprobs"] = scores
    if plan.body.return_token_ids:
        answer["prompt_token_ids"] = plan.candidates[0].token_ids
    return answer


async def stream_chat(
    service: Service, plan: Plan, answer: AnswerStream | None = None
) -> AsyncGenerator[ChatCompletionChunk]:
    """Of each choice first the role, then its pieces as they come; the usage, if wanted, after all of them. What was
    sent is not."""
    answer = answer or AnswerStream()
    async with aclosing(choices_and_usage(plan, answer, _choice_events(service, plan))) as parts:
        async for choices, usage in parts:
            chunk: ChatCompletionChunk = {
                "id": f"chatcmpl-{answer.key}",
                "object": "chat.completion.chunk",
                "created": answer.created,
                "model": service.config.served_name,
                "choices": choices,
            }
            if plan.body.includes_usage:
                chunk["usage"] = usage
            yield chunk


async def _choice_events(service: Service, plan: Plan) -> AsyncGenerator[ChoiceEvent[ChatChunkChoice]]:
    begun: set[int] = set()
    async with aclosing(stream_choices(service, plan)) as pieces:
        async for index, piece in pieces:
            if index not in begun:
                begun.add(index)
                yield ChoiceEvent(index, _beginning(index), [])
            token_ids = [token.token_id for token in piece.tokens]
            yield ChoiceEvent(index, _chunk_choice(service, plan, index, piece), token_ids)


def _check(body: ChatCompletionRequest) -> None:
    limits = body.max_tokens, body.max_completion_tokens
    if None not in limits and limits[0] != limits[1]:
        raise InvalidRequestError("max_tokens", body.max_tokens, f"is not max_completion_tokens={limits[1]}")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs", body.top_logprobs, "goes with logprobs only")


def _choice(service: Service, plan: Plan, index: int, piece: Piece) -> ChatChoice:
    assert piece.finish_reason is not None
    choice: ChatChoice = {
        "index": index,
        "message": {"role": "assistant", "content": piece.text, "refusal": None},
        "logprobs": _logprobs(service, plan, piece),
        "finish_reason": FINISH_REASONS[piece.finish_reason],
    }
    if plan.body.return_token_ids:
        choice["token_ids"] = [token.token_id for token in piece.tokens]
    return choice


def _beginning(index: int) -> ChatChunkChoice:
    return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


def _chunk_choice(service: Service, plan: Plan, index: int, piece: Piece) -> ChatChunkChoice:
    delta: ChatDelta = {"content": piece.text} if piece.text else {}
    choice: ChatChunkChoice = {
        "index": index,
        "delta": delta,
        "logprobs": _logprobs(service, plan, piece),
        "finish_reason": None if piece.finish_reason is None else FINISH_REASONS[piece.finish_reason],
    }
    if plan.body.return_token_ids:
        choice["token_ids"] = [token.token_id for token in piece.tokens]
    return choice


def _logprobs(service: Service, plan: Plan, piece: Piece) -> ChatLogprobs | None:
    if plan.num_shown_logprobs is None:
        return None
    return chat_logprobs(service.tokenizer, piece.tokens, plan.num_shown_logprobs)
