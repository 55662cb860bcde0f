"""Routes in Hugging Face's shape: `/generate` as Text Generation Inference, `/classify` and `/qa` as the pipelines."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptj_serve.api import question_answering
from gptj_serve.api.classification import classify
from gptj_serve.api.errors import hugging_face_error
from gptj_serve.api.huggingface_schemas import ClassifyRequest, GenerateRequest, QARequest
from gptj_serve.api.service import Service
from gptj_serve.api.streaming import event_stream
from gptj_serve.api.text_generation import generate_stream, generate_whole
from gptj_serve.api.zero_shot_classification import classify_zero_shot

__all__ = ["answer_whole", "classify_whole", "generate_stream", "generate_whole", "router"]

router = APIRouter(tags=["Hugging Face"])


@router.post("/generate", summary="Complete a text")
async def generate(body: GenerateRequest, request: Request) -> Response:
    """TGI's `/generate`; with `"stream": true`, server-sent events, one per token."""
    service: Service = request.app.state.service
    if body.stream:
        events = generate_stream(service, body)
        return await event_stream(events, hugging_face_error)
    return JSONResponse(await generate_whole(service, body))


@router.post("/generate_stream", summary="Complete a text, streamed")
async def generate_streamed(body: GenerateRequest, request: Request) -> Response:
    """TGI's `/generate_stream`: always server-sent events."""
    return await event_stream(generate_stream(request.app.state.service, body), hugging_face_error)


@router.post("/classify", summary="Classify texts")
async def classify_texts(body: ClassifyRequest, request: Request) -> Response:
    """Labels with scores, best first: one list per input, also for a single input (as Hugging Face's API answers).

    With `candidate_labels`, zero-shot: for a single input its labels with scores, which is what Hugging Face's API
    answers; for a list `{"sequence", "labels", "scores"}` per input, which is what transformers' pipeline returns.
    """
    return JSONResponse(await classify_whole(request.app.state.service, body))


@router.post("/qa", summary="Answer questions from their contexts")
async def answer(body: QARequest, request: Request) -> Response:
    """`{"answer", "score", "start", "end"}`; a list of them if `top_k` is over 1, and a list per question for lists."""
    return JSONResponse(await answer_whole(request.app.state.service, body))


async def classify_whole(service: Service, body: ClassifyRequest) -> Any:
    if body.parameters.candidate_labels is not None:
        results = await classify_zero_shot(service, body)
        if isinstance(body.inputs, list):
            return [asdict(result) for result in results]
        pairs = zip(results[0].labels, results[0].scores, strict=True)
        return [{"label": label, "score": score} for label, score in pairs]
    return [[asdict(label) for label in labels] for labels in await classify(service, body)]


async def answer_whole(service: Service, body: QARequest) -> Any:
    per_question = [list(map(asdict, answers)) for answers in await question_answering.answer(service, body)]
    shaped = per_question if body.parameters.top_k > 1 else [answers[0] for answers in per_question]
    return shaped if isinstance(body.inputs, list) else shaped[0]
