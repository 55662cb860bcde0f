"""Routes in OpenAI's shape: `/v1/completions` and `/v1/models`."""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptj_serve.api.errors import openai_error
from gptj_serve.api.schemas import DEFAULT_MAX_TOKENS, CompletionRequest
from gptj_serve.api.service import GenerationParams, Service, check_minimum, new_seed, run_all
from gptj_serve.api.streaming import event_stream, merged
from gptj_serve.errors import InvalidRequestError
from gptj_serve.types import FinishReason, SamplingParams

router = APIRouter(prefix="/v1", tags=["OpenAI"])

_FINISH_REASONS = {FinishReason.EOS: "stop", FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class _Choice:
    """One of the completions that a request asks for: `n` for each prompt, numbered across all prompts."""

    index: int
    token_ids: list[int]
    params: GenerationParams


@router.get("/models", summary="The served model")
async def models(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    return {"object": "list", "data": [_model_card(service, request.app.state.started_at)]}


@router.get("/models/{model:path}", summary="One model")
async def model(model: str, request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    _check_model(service, model)
    return _model_card(service, request.app.state.started_at)


@router.post("/completions", summary="Complete one or several prompts")
async def completions(body: CompletionRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    choices = _choices(service, body)
    header = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.config.served_name,
    }
    if body.stream:
        return await event_stream(_stream(service, body, choices, header), openai_error, end_marker="[DONE]")
    results = await run_all([_complete(service, body, choice) for choice in choices])
    num_completion_tokens = sum(num_tokens for _, num_tokens in results)
    usage = _usage(body, choices, num_completion_tokens)
    return JSONResponse(header | {"choices": [choice for choice, _ in results], "usage": usage})


def _choices(service: Service, body: CompletionRequest) -> list[_Choice]:
    """Check the whole request before any of it is started."""
    _check_model(service, body.model)
    n = body.n or 1
    if len(body.prompts) * n > service.config.ingress.max_batch_inputs:
        raise InvalidRequestError(
            "prompt", len(body.prompts) * n, f"at most {service.config.ingress.max_batch_inputs} completions at once"
        )
    max_tokens = body.max_tokens or DEFAULT_MAX_TOKENS
    check_minimum("min_tokens", body.min_tokens, max_tokens)
    seed = new_seed() if body.seed is None else body.seed
    choices: list[_Choice] = []
    for prompt in body.prompts:
        token_ids = service.encode_prompt(prompt, max_tokens, "prompt", "max_tokens")
        for _ in range(n):
            sampling = SamplingParams(
                max_new_tokens=max_tokens,
                min_new_tokens=body.min_tokens,
                temperature=1.0 if body.temperature is None else body.temperature,
                top_k=max(body.top_k, 0),
                top_p=1.0 if body.top_p is None else body.top_p,
                seed=(seed + len(choices)) % 2**63,
                stop_token_ids=service.check_token_ids(body.stop_token_ids, "stop_token_ids"),
                ignore_eos=body.ignore_eos,
            )
            params = GenerationParams(sampling, body.stop_strings, body.include_stop_str_in_output)
            choices.append(_Choice(len(choices), token_ids, params))
    return choices


async def _complete(service: Service, body: CompletionRequest, choice: _Choice) -> tuple[dict[str, Any], int]:
    """One finished choice and its number of tokens."""
    async with aclosing(service.generate(choice.token_ids, choice.params)) as stream:
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.text for chunk in chunks)
    token_ids = [chunk.token_id for chunk in chunks]
    return _choice_body(body, choice, text, token_ids, chunks[-1].finish_reason), len(chunks)


async def _stream(
    service: Service, body: CompletionRequest, choices: list[_Choice], header: dict[str, Any]
) -> AsyncGenerator[dict[str, Any]]:
    """A chunk per piece of text of any choice, as they come; the usage, if wanted, after all of them."""
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    no_usage = {"usage": None} if include_usage else {}
    num_completion_tokens = 0
    pending: dict[int, list[int]] = {choice.index: [] for choice in choices}  # tokens whose text is withheld
    async with aclosing(merged([service.generate(c.token_ids, c.params) for c in choices])) as stream:
        async for index, chunk in stream:
            num_completion_tokens += 1
            pending[index].append(chunk.token_id)
            if not chunk.text and chunk.finish_reason is None:
                continue
            token_ids, pending[index] = pending[index], []
            piece = _choice_body(body, choices[index], chunk.text, token_ids, chunk.finish_reason)
            yield header | {"choices": [piece]} | no_usage
    if include_usage:
        yield header | {"choices": [], "usage": _usage(body, choices, num_completion_tokens)}


def _choice_body(
    body: CompletionRequest, choice: _Choice, text: str, token_ids: list[int], finish_reason: FinishReason | None
) -> dict[str, Any]:
    content = {
        "index": choice.index,
        "text": text,
        "logprobs": None,
        "finish_reason": None if finish_reason is None else _FINISH_REASONS[finish_reason],
    }
    return content | {"token_ids": token_ids} if body.return_token_ids else content


def _usage(body: CompletionRequest, choices: list[_Choice], num_completion_tokens: int) -> dict[str, int]:
    num_prompt_tokens = sum(len(choice.token_ids) for choice in choices[:: body.n or 1])
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def _check_model(service: Service, model: str) -> None:
    if model != service.config.served_name:
        raise InvalidRequestError("model", model, f"this service has {service.config.served_name!r} only")


def _model_card(service: Service, started_at: int) -> dict[str, Any]:
    return {
        "id": service.config.served_name,
        "object": "model",
        "created": started_at,
        "owned_by": "gptj_serve",
        "max_model_len": service.model.n_positions,
    }
