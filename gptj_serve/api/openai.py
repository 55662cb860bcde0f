"""Routes in OpenAI's shape: chats, completions, embeddings, models."""

from typing import Annotated

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse

from gptj_serve.api import examples
from gptj_serve.api.chat import complete_chat, make_chat_plan, stream_chat
from gptj_serve.api.chat_schemas import ChatCompletionRequest
from gptj_serve.api.completion_plan import make_plan
from gptj_serve.api.completions import complete, stream_completion
from gptj_serve.api.embedding_schemas import EmbeddingRequest
from gptj_serve.api.embeddings import openai_embeddings
from gptj_serve.api.errors import openai_error
from gptj_serve.api.openai_responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    EmbeddingList,
    ModelCard,
    ModelList,
)
from gptj_serve.api.openai_schemas import CompletionRequest
from gptj_serve.api.resumption import AnswerStream, LastEventID, refuse_if_whole
from gptj_serve.api.route_docs import END_OF_STREAM, openai_answers
from gptj_serve.api.service import Service
from gptj_serve.api.streaming import event_stream

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.get(
    "/models", summary="The served model", responses=openai_answers(ModelList, "A list of one model.", has_body=False)
)
async def list_models(request: Request) -> Response:
    """The served model, and only that.

    Its heads are not listed, as vLLM lists its adapters: whoever asks for this list chooses what to generate with, and
    a head can't do that. `GET /status` names them.
    """
    service: Service = request.app.state.service
    body: ModelList = {"object": "list", "data": [_model_card(service, request.app.state.status.started_at)]}
    return JSONResponse(body)


@router.get("/models/{model:path}", summary="One model", responses=openai_answers(ModelCard, "The served model."))
async def get_model(model: str, request: Request) -> Response:
    """The served model, if that is its name; else 404."""
    service: Service = request.app.state.service
    service.check_model(model)
    return JSONResponse(_model_card(service, request.app.state.status.started_at))


@router.post(
    "/completions",
    summary="Complete one or several prompts",
    responses=openai_answers(Completion, "The choices, in the order of the prompts.", events=CompletionChunk),
)
async def create_completion(
    body: Annotated[CompletionRequest, Body(openapi_examples=examples.COMPLETIONS)],
    request: Request,
    last_event_id: LastEventID,
) -> Response:
    """OpenAI's `/v1/completions`, with vLLM's and transformers' names for what OpenAI lacks.

    With `"stream": true`, server-sent events.
    """
    service: Service = request.app.state.service
    service.check_model(body.model)
    if body.stream:
        answer = AnswerStream.of("/v1/completions", body, body, last_event_id)
        plan = await make_plan(service, body.model_copy(update={"seed": answer.seed}))
        return await event_stream(stream_completion(service, plan, answer), answer, openai_error, END_OF_STREAM)
    refuse_if_whole(last_event_id)
    return JSONResponse(await complete(service, await make_plan(service, body)))


@router.post(
    "/chat/completions",
    summary="Answer a chat",
    responses=openai_answers(ChatCompletion, "The choices.", events=ChatCompletionChunk),
)
async def create_chat_completion(
    body: Annotated[ChatCompletionRequest, Body(openapi_examples=examples.CHATS)],
    request: Request,
    last_event_id: LastEventID,
) -> Response:
    """OpenAI's `/v1/chat/completions`, with vLLM's and transformers' names for what OpenAI lacks.

    GPT-J completes texts. It answers chats once the deployment has a chat template, which makes a text of them:
    `chat_template` in its configuration, or one in the checkpoint's directory. Without one, 400.
    """
    service: Service = request.app.state.service
    service.check_model(body.model)
    if body.stream:
        answer = AnswerStream.of("/v1/chat/completions", body, body, last_event_id)
        plan = await make_chat_plan(service, body.model_copy(update={"seed": answer.seed}))
        return await event_stream(stream_chat(service, plan, answer), answer, openai_error, END_OF_STREAM)
    refuse_if_whole(last_event_id)
    return JSONResponse(await complete_chat(service, await make_chat_plan(service, body)))


@router.post(
    "/embeddings",
    summary="Embed one or several texts",
    responses=openai_answers(EmbeddingList, "The vectors, in the order of the inputs."),
)
async def create_embeddings(
    body: Annotated[EmbeddingRequest, Body(openapi_examples=examples.EMBEDDINGS)], request: Request
) -> Response:
    """OpenAI's `/v1/embeddings`: the mean of the model's last hidden states, scaled to length 1, unless told otherwise.

    A GPT-J is not trained for it: texts that mean alike come out near each other only by and large.
    """
    service: Service = request.app.state.service
    service.check_model(body.model)
    return Response(await openai_embeddings(service, body), media_type="application/json")


def _model_card(service: Service, started_at: float) -> ModelCard:
    return {
        "id": service.config.served_name,
        "object": "model",
        "created": int(started_at),
        "owned_by": "gptj_serve",
        "max_model_len": service.model.n_positions,
    }
