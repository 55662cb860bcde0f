"""Routes in Hugging Face's shapes.

`/generate` as Text Generation Inference, `/embed` as Text Embeddings Inference, `/classify` and `/qa` as transformers'
pipelines.
"""

from typing import Annotated

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from gptj_serve.api import examples, question_answering
from gptj_serve.api.classification import classify
from gptj_serve.api.embedding_schemas import EmbedRequest
from gptj_serve.api.embeddings import embed_to_json
from gptj_serve.api.errors import hugging_face_error
from gptj_serve.api.huggingface_responses import (
    ClassifyAnswers,
    GenerateAnswers,
    GenerateEvent,
    LabelScore,
    QAAnswers,
)
from gptj_serve.api.huggingface_schemas import ClassifyRequest, GenerateRequest, QARequest
from gptj_serve.api.resumption import AnswerStream, LastEventID, refuse_if_whole
from gptj_serve.api.route_docs import hugging_face_answers
from gptj_serve.api.service import Service
from gptj_serve.api.streaming import event_stream
from gptj_serve.api.text_generation import generate_stream, generate_whole
from gptj_serve.api.zero_shot_classification import classify_zero_shot
from gptj_serve.errors import InvalidRequestError

__all__ = ["answer_whole", "classify_whole", "generate_stream", "generate_whole", "router"]

router = APIRouter(tags=["Hugging Face"])

GenerateBody = Annotated[GenerateRequest, Body(openapi_examples=examples.GENERATE)]
StreamBody = Annotated[GenerateRequest, Body(openapi_examples=examples.GENERATE_STREAM)]
ClassifyBody = Annotated[ClassifyRequest, Body(openapi_examples=examples.CLASSIFY)]
HeadClassifyBody = Annotated[ClassifyRequest, Body(openapi_examples=examples.CLASSIFY_WITH_HEAD)]
QABody = Annotated[QARequest, Body(openapi_examples=examples.QA)]

_CLASSIFY_ANSWERS = hugging_face_answers(ClassifyAnswers, "Labels with scores, best first.")
_QA_ANSWERS = hugging_face_answers(QAAnswers, "The answers, best first.")


@router.post(
    "/generate",
    summary="Complete a text",
    responses=hugging_face_answers(
        GenerateAnswers, "The text; a list for num_return_sequences over 1.", events=GenerateEvent
    ),
)
async def generate(body: GenerateBody, request: Request, last_event_id: LastEventID) -> Response:
    """TGI's `/generate`; with `"stream": true`, server-sent events, one per token."""
    service: Service = request.app.state.service
    if body.stream:
        return await _stream(service, body, last_event_id)
    refuse_if_whole(last_event_id)
    return JSONResponse(await generate_whole(service, body))


@router.post(
    "/generate_stream",
    summary="Complete a text, streamed",
    response_class=StreamingResponse,
    responses=hugging_face_answers(None, "The text, as it comes.", events=GenerateEvent),
)
async def stream_generate(body: StreamBody, request: Request, last_event_id: LastEventID) -> Response:
    """TGI's `/generate_stream`: always server-sent events."""
    return await _stream(request.app.state.service, body, last_event_id)


@router.post("/classify", summary="Classify texts", responses=_CLASSIFY_ANSWERS)
async def classify_texts(body: ClassifyBody, request: Request) -> Response:
    """Labels with scores, best first: one list per input, also for a single input (as Hugging Face's API answers).

    With `candidate_labels`, zero-shot: for a single input its labels with scores, which is what Hugging Face's API
    answers; for a list `{"sequence", "labels", "scores"}` per input, which is what transformers' pipeline returns.
    """
    return JSONResponse(await classify_whole(request.app.state.service, body))


@router.post("/classify/{head:path}", summary="Classify texts with a head", responses=_CLASSIFY_ANSWERS)
async def classify_texts_with_head(head: str, body: HeadClassifyBody, request: Request) -> Response:
    """As `/classify` with this head as `model`, for clients who have only an address to say it with."""
    service: Service = request.app.state.service
    _check_head(service, head, body.model, "score", "classification")
    return JSONResponse(await classify_whole(service, body.model_copy(update={"model": head})))


@router.post("/qa", summary="Answer questions from their contexts", responses=_QA_ANSWERS)
async def answer_questions(body: QABody, request: Request) -> Response:
    """`{"answer", "score", "start", "end"}` for a question, and a list of them if `top_k` is over 1; for a list of
    questions, a list with what each of them would get.
    """
    return JSONResponse(await answer_whole(request.app.state.service, body))


@router.post("/qa/{head:path}", summary="Answer questions with a head", responses=_QA_ANSWERS)
async def answer_questions_with_head(head: str, body: QABody, request: Request) -> Response:
    """As `/qa` with this head as `model`, for clients who have only an address to say it with."""
    service: Service = request.app.state.service
    _check_head(service, head, body.model, "qa_outputs", "question answering")
    return JSONResponse(await answer_whole(service, body.model_copy(update={"model": head})))


@router.post(
    "/embed",
    summary="Embed texts",
    responses=hugging_face_answers(list[list[float]], "A vector per input, also for a single one."),
)
async def embed_texts(
    body: Annotated[EmbedRequest, Body(openapi_examples=examples.EMBED)], request: Request
) -> Response:
    """Text Embeddings Inference's `/embed`; the vectors are those of `/v1/embeddings`."""
    return Response(await embed_to_json(request.app.state.service, body), media_type="application/json")


async def classify_whole(service: Service, body: ClassifyRequest) -> ClassifyAnswers:
    if body.parameters.candidate_labels is None:
        return await classify(service, body)
    results = await classify_zero_shot(service, body)
    if isinstance(body.inputs, list):
        return results
    pairs = zip(results[0]["labels"], results[0]["scores"], strict=True)
    return [LabelScore(label=label, score=score) for label, score in pairs]


async def answer_whole(service: Service, body: QARequest) -> QAAnswers:
    per_question = await question_answering.answer(service, body)
    if body.parameters.top_k > 1:
        return per_question if isinstance(body.inputs, list) else per_question[0]
    best = [answers[0] for answers in per_question]
    return best if isinstance(body.inputs, list) else best[0]


async def _stream(service: Service, body: GenerateRequest, last_event_id: str | None) -> StreamingResponse:
    answer = AnswerStream.of("/generate", body, body.parameters, last_event_id)
    parameters = body.parameters.model_copy(update={"seed": answer.seed})
    seeded = body.model_copy(update={"parameters": parameters})
    return await event_stream(generate_stream(service, seeded, answer), answer, hugging_face_error)


def _check_head(service: Service, head: str, model: str | None, kind: str, task: str) -> None:
    names = service.head_names(kind)
    if head not in names:
        there_are = ", ".join(map(repr, names)) or "none"
        raise HTTPException(404, f"there is no {task} head {head!r}; this service has {there_are}")
    if model not in (None, head):
        raise InvalidRequestError("model", model, f"is not the head of the address, {head!r}")
