"""Routes about the tokenizer, in the shapes of Text Generation Inference and vLLM."""

from typing import Annotated

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse

from gptj_serve.api import examples, tokenization
from gptj_serve.api.huggingface_responses import Detokenized, TextToken, Tokenized, TokenizerInfo
from gptj_serve.api.route_docs import hugging_face_answers
from gptj_serve.api.tokenization_schemas import DetokenizeRequest, TokenizeRequest

router = APIRouter(tags=["Tokenizer"])


@router.post(
    "/tokenize",
    summary="The tokens of a text or a chat",
    responses=hugging_face_answers(
        Tokenized | list[TextToken], "Token ids in vLLM's shape; for `inputs`, tokens in Text Generation Inference's."
    ),
)
async def tokenize(
    body: Annotated[TokenizeRequest, Body(openapi_examples=examples.TOKENIZE)], request: Request
) -> Response:
    """`prompt` or `messages` as vLLM's `/tokenize`; `inputs` as Text Generation Inference's."""
    answer = await tokenization.tokenize_to_json(request.app.state.service, body)
    return Response(answer, media_type="application/json")


@router.post(
    "/detokenize",
    summary="The text of tokens",
    responses=hugging_face_answers(Detokenized, "The text, with special tokens."),
)
async def detokenize(
    body: Annotated[DetokenizeRequest, Body(openapi_examples=examples.DETOKENIZE)], request: Request
) -> Response:
    """vLLM's `/detokenize`."""
    return JSONResponse(await tokenization.detokenize(request.app.state.service, body))


@router.get(
    "/tokenizer_info",
    summary="Special tokens and chat template",
    responses=hugging_face_answers(TokenizerInfo, "What a client needs to write prompts.", has_body=False),
)
async def tokenizer_info(request: Request) -> Response:
    """vLLM's `/tokenizer_info`, as far as GPT-J has it; lm-evaluation-harness asks for it."""
    return JSONResponse(tokenization.tokenizer_info(request.app.state.service))
