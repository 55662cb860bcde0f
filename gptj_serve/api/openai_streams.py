"""The chunks of OpenAI's streams: what those of completions and of chats have in common."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from gptj_serve.api.completion_plan import Plan
from gptj_serve.api.openai_responses import Usage
from gptj_serve.api.resumption import AnswerStream, ChoiceEvent

Choice = TypeVar("Choice")


async def choices_and_usage(
    plan: Plan, answer: AnswerStream, events: AsyncGenerator[ChoiceEvent[Choice]]
) -> AsyncGenerator[tuple[list[Choice], Usage | None]]:
    """Of each chunk that was not sent yet: a choice for each event, and after all of them, if wanted, the usage."""
    num_closing = 2 if plan.body.includes_usage else 1  # the usage and the end marker
    async with aclosing(answer.rest(events, len(plan.candidates), num_closing)) as rest:
        async for event in rest:
            shows_usage = plan.body.includes_usage and plan.body.includes_continuous_usage
            yield [event.body], usage_of(plan, answer.num_tokens) if shows_usage else None
    if plan.body.includes_usage and answer.closes():
        yield [], usage_of(plan, answer.num_tokens)


def usage_of(plan: Plan, num_completion_tokens: int) -> Usage:
    return {
        "prompt_tokens": plan.num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": plan.num_prompt_tokens + num_completion_tokens,
    }
