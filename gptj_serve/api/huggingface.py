"""Routes in Hugging Face's shape: `/generate` as Text Generation Inference, `/classify` and `/qa` as the pipelines."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptj_serve.api.errors import hugging_face_error
from gptj_serve.api.schemas import ClassifyRequest, GenerateRequest, QARequest
from gptj_serve.api.service import GenerationParams, Service, TextChunk
from gptj_serve.api.streaming import event_stream
from gptj_serve.types import FinishReason

router = APIRouter(tags=["Hugging Face"])

_FINISH_REASONS = {
    FinishReason.EOS: "eos_token",
    FinishReason.STOP: "stop_sequence",
    FinishReason.LENGTH: "length",
}


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
async def classify(body: ClassifyRequest, request: Request) -> Response:
    """Labels with scores, best first: one list per input, also for a single input (as Hugging Face's API answers).

    With `candidate_labels`, zero-shot: for a single input its labels with scores, which is what Hugging Face's API
    answers; for a list `{"sequence", "labels", "scores"}` per input, which is what transformers' pipeline returns.
    """
    return JSONResponse(await classify_whole(request.app.state.service, body))


@router.post("/qa", summary="Answer questions from their contexts")
async def answer(body: QARequest, request: Request) -> Response:
    """`{"answer", "score", "start", "end"}`; a list of them if `top_k` is over 1, and a list per question for lists."""
    return JSONResponse(await answer_whole(request.app.state.service, body))


async def generate_whole(service: Service, body: GenerateRequest) -> dict[str, Any]:
    """The whole answer: `generated_text`, and with `details` its tokens."""
    params, token_ids = _prepare(service, body)
    async with aclosing(service.generate(token_ids, params)) as stream:
        chunks = [chunk async for chunk in stream]
    answer: dict[str, Any] = {"generated_text": _generated_text(body, chunks)}
    if body.parameters.details:
        answer["details"] = _details(params, chunks) | {
            "prefill": [],
            "tokens": [_token(service, chunk) for chunk in chunks],
        }
    return answer


async def generate_stream(service: Service, body: GenerateRequest) -> AsyncGenerator[dict[str, Any]]:
    """TGI's events: each token, and with the last one the whole text."""
    params, token_ids = _prepare(service, body)
    chunks: list[TextChunk] = []
    async with aclosing(service.generate(token_ids, params)) as stream:
        async for chunk in stream:
            chunks.append(chunk)
            is_last = chunk.finish_reason is not None
            yield {
                "index": len(chunks),
                "token": _token(service, chunk),
                "generated_text": _generated_text(body, chunks) if is_last else None,
                "details": _details(params, chunks) if is_last else None,
            }


async def classify_whole(service: Service, body: ClassifyRequest) -> Any:
    if body.parameters.candidate_labels is not None:
        results = await service.classify_zero_shot(body)
        if isinstance(body.inputs, list):
            return [asdict(result) for result in results]
        pairs = zip(results[0].labels, results[0].scores, strict=True)
        return [{"label": label, "score": score} for label, score in pairs]
    return [[asdict(label) for label in labels] for labels in await service.classify(body)]


async def answer_whole(service: Service, body: QARequest) -> Any:
    per_question = [[asdict(answer) for answer in answers] for answers in await service.answer(body)]
    shaped = per_question if body.parameters.top_k > 1 else [answers[0] for answers in per_question]
    return shaped if isinstance(body.inputs, list) else shaped[0]


def _prepare(service: Service, body: GenerateRequest) -> tuple[GenerationParams, list[int]]:
    params = service.generation_params(body)
    max_new_tokens = params.sampling.max_new_tokens
    return params, service.encode_prompt(body.inputs, max_new_tokens, "inputs", "parameters.max_new_tokens")


def _generated_text(body: GenerateRequest, chunks: list[TextChunk]) -> str:
    text = "".join(chunk.text for chunk in chunks)
    return body.inputs + text if body.parameters.return_full_text else text


def _token(service: Service, chunk: TextChunk) -> dict[str, Any]:
    special = chunk.token_id in service.tokenizer.special_token_ids
    return {"id": chunk.token_id, "text": chunk.token_text, "logprob": chunk.logprob, "special": special}


def _details(params: GenerationParams, chunks: list[TextChunk]) -> dict[str, Any]:
    finish_reason = chunks[-1].finish_reason
    assert finish_reason is not None
    return {
        "finish_reason": _FINISH_REASONS[finish_reason],
        "generated_tokens": len(chunks),
        "seed": params.sampling.seed if params.sampling.temperature > 0 else None,
    }
