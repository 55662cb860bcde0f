"""Text to tokens and back for clients, in the shapes of Text Generation Inference and of vLLM."""

from gptj_serve.api.chat import chat_prompt
from gptj_serve.api.huggingface_responses import Detokenized, TextToken, Tokenized, TokenizerInfo
from gptj_serve.api.service import Service, off_loop
from gptj_serve.api.tokenization_schemas import DetokenizeRequest, TokenizeRequest
from gptj_serve.errors import InvalidRequestError

TOKENIZER_CLASS = "GPT2Tokenizer"  # transformers' for GPT-J


async def tokenize(service: Service, body: TokenizeRequest) -> list[TextToken] | Tokenized:
    """Texts of any length are answered, up to the limit of a body."""
    _check(service, body)
    if body.inputs is not None:
        return await _text_tokens(service, body.inputs)
    if body.messages is not None:
        text = await chat_prompt(service, body.messages, body, is_truncated=True)
    else:
        assert body.prompt is not None
        text = body.prompt
    token_ids = await off_loop(len(text), service.tokenizer.encode, text)
    answer: Tokenized = {"count": len(token_ids), "max_model_len": service.model.n_positions, "tokens": token_ids}
    if body.return_token_strs:
        answer["token_strs"] = [service.tokenizer.token_string(token_id) for token_id in token_ids]
    else:
        answer["token_strs"] = None
    return answer


async def detokenize(service: Service, body: DetokenizeRequest) -> Detokenized:
    """With special tokens. Ids without a token become nothing."""
    service.check_model(body.model)
    token_ids = service.check_token_ids(body.tokens, "tokens")
    return {"prompt": service.tokenizer.decode(token_ids, skip_special_tokens=False)}


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


async def _text_tokens(service: Service, text: str) -> list[TextToken]:
    encoding = await off_loop(len(text), service.tokenizer.encode_with_offsets, text)
    return [
        {"id": token_id, "text": text[start:stop], "start": start, "stop": stop}
        for token_id, (start, stop) in zip(encoding.token_ids, encoding.offsets, strict=True)
    ]
