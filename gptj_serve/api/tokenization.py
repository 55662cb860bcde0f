"""Text to tokens and back for clients, in the shapes of Text Generation Inference and of vLLM."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from gptj_serve.api.chat import chat_prompt
from gptj_serve.api.huggingface_responses import Detokenized, TextToken, Tokenized, TokenizerInfo
from gptj_serve.api.json_answers import encode_answer
from gptj_serve.api.service import Service, off_loop
from gptj_serve.api.tokenization_schemas import DetokenizeRequest, TokenizeRequest
from gptj_serve.errors import InvalidRequestError

Answer = TypeVar("Answer")

TOKENIZER_CLASS = "GPT2Tokenizer"  # transformers' for GPT-J


async def tokenize(service: Service, body: TokenizeRequest) -> list[TextToken] | Tokenized:
    """Texts of any length are answered, up to the limit of a body."""
    if body.inputs is not None:
        return await _with_text(service, body, lambda text: list(_text_tokens(service, text)))
    return await _with_text(service, body, lambda text: _tokenized(service, text, body))


async def tokenize_to_json(service: Service, body: TokenizeRequest) -> bytes:
    """The same, without ever having the 50 times longer list of tokens in memory as objects."""
    if body.inputs is not None:
        return await _with_text(service, body, lambda text: encode_answer(_text_tokens(service, text)))
    return await _with_text(service, body, lambda text: encode_answer(_tokenized(service, text, body)))


async def detokenize(service: Service, body: DetokenizeRequest) -> Detokenized:
    """With special tokens. Ids without a token become nothing."""
    service.check_model(body.model)

    def text() -> str:
        token_ids = service.check_token_ids(body.tokens, "tokens")
        return service.tokenizer.decode(token_ids, skip_special_tokens=False)

    return {"prompt": await off_loop(len(body.tokens), text)}


def tokenizer_info(service: Service) -> TokenizerInfo:
    """What lm-evaluation-harness asks vLLM's server for."""
    model, tokenizer = service.model, service.tokenizer

    def text(token_id: int | None) -> str | None:
        return None if token_id is None else tokenizer.decode([token_id], skip_special_tokens=False)

    return {
        "tokenizer_class": TOKENIZER_CLASS,
        "bos_token": text(model.bos_token_id),
        "eos_token": text(min(model.eos_token_ids, default=None)),
        "pad_token": text(model.pad_token_id),
        "model_max_length": model.n_positions,
        "chat_template": None if service.chat_template is None else service.chat_template.source,
    }


def _check(service: Service, body: TokenizeRequest) -> None:
    service.check_model(body.model)
    given = [name for name in ("inputs", "prompt", "messages") if getattr(body, name) is not None]
    if not given:
        raise InvalidRequestError("inputs", None, "must have one of inputs, prompt, messages")
    if len(given) > 1:
        raise InvalidRequestError(given[1], getattr(body, given[1]), f"does not go with {given[0]}")
    if body.messages is None:
        for field in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if value := getattr(body, field):
                raise InvalidRequestError(field, value, "goes with messages only")
    if body.inputs is not None and body.return_token_strs:
        raise InvalidRequestError("return_token_strs", True, "goes with prompt or messages only")


async def _with_text(service: Service, body: TokenizeRequest, answer: Callable[[str], Answer]) -> Answer:
    """What `answer` makes of the text that is meant."""
    _check(service, body)
    text = body.prompt if body.inputs is None else body.inputs
    if body.messages is not None:
        text = await chat_prompt(service, body.messages, body, is_truncated=True)
    assert text is not None
    return await off_loop(len(text), answer, text)


def _text_tokens(service: Service, text: str) -> Iterator[TextToken]:
    encoding = service.tokenizer.encode_with_offsets(text)
    for token_id, (start, stop) in zip(encoding.token_ids, encoding.offsets, strict=True):
        yield {"id": token_id, "text": text[start:stop], "start": start, "stop": stop}


def _tokenized(service: Service, text: str, body: TokenizeRequest) -> Tokenized:
    token_ids = service.tokenizer.encode(text)
    strings = [service.tokenizer.token_string(token_id) for token_id in token_ids] if body.return_token_strs else None
    max_model_len = service.model.n_positions
    return {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": strings}
