"""Routes in OpenAI's shape: `/v1/completions` and `/v1/models`."""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptj_serve.api.completion_plan import Plan, make_plan
from gptj_serve.api.completions import complete, stream_pieces
from gptj_serve.api.errors import openai_error
from gptj_serve.api.openai_schemas import CompletionRequest
from gptj_serve.api.service import Service
from gptj_serve.api.streaming import event_stream
from gptj_serve.errors import InvalidRequestError

router = APIRouter(prefix="/v1", tags=["OpenAI"])


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
    """OpenAI's `/v1/completions`, with vLLM's and transformers' names for what OpenAI lacks."""
    service: Service = request.app.state.service
    _check_model(service, body.model)
    plan = await make_plan(service, body)
    header = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.config.served_name,
    }
    if body.stream:
        return await event_stream(_stream(service, plan, header), openai_error, end_marker="[DONE]")
    return JSONResponse(header | await complete(service, plan))


async def _stream(service: Service, plan: Plan, header: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    async with aclosing(stream_pieces(service, plan)) as parts:
        async for part in parts:
            yield header | part


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
