"""The chunks of OpenAI's streams: what those of completions and of chats have in common."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

from gptj_serve.api.completion_plan import Plan
from gptj_serve.api.openai_responses import Usage
from gptj_serve.api.resumption import AnswerStream, ChoiceEvent
from gptj_serve.api.service import Service

Choice = TypeVar("Choice")


async def stream_chunks(
    service: Service,
    plan: Plan,
    answer: AnswerStream,
    events: AsyncGenerator[ChoiceEvent[Choice]],
    object_: str,
    id_prefix: str,
) -> AsyncGenerator[Any]:
    """A chunk of the kind `object_` for each event that was not sent yet; the usage, if wanted, after all of them."""
    include_usage = plan.body.includes_usage

    def chunk(choices: list[Choice], *, is_last: bool = False) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": f"{id_prefix}-{answer.key}",
            "object": object_,
            "created": answer.created,
            "model": service.config.served_name,
            "choices": choices,
        }
        if include_usage:
            shows_usage = is_last or plan.body.includes_continuous_usage
            body["usage"] = usage_of(plan, answer.num_tokens) if shows_usage else None
        return body

    num_closing = 2 if include_usage else 1  # the usage and the end marker
    async with aclosing(answer.rest(events, len(plan.candidates), num_closing)) as rest:
        async for event in rest:
            yield chunk([event.body])
    if include_usage and answer.closes():
        yield chunk([], is_last=True)


def usage_of(plan: Plan, num_completion_tokens: int) -> Usage:
    return {
        "prompt_tokens": plan.num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": plan.num_prompt_tokens + num_completion_tokens,
    }
