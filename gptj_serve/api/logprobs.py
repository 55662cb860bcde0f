"""Tokens with their log-probabilities, and the shapes in which clients expect them."""

from collections.abc import Sequence
from dataclasses import dataclass

from gptj_serve.api.openai_responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from gptj_serve.tokenizer import IncrementalDetokenizer, Tokenizer
from gptj_serve.types import Matrix, TokenLogprob

MIN_LOGPROB = -9999.0
"""Stands for what is smaller, minus infinity included, which JSON has no word for (vLLM's number)."""


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a prompt or a completion."""

    token_id: int
    text: str  # its own text, as far as it is whole characters
    logprob: float | None  # None: not known, as of a prompt's first token
    top: Sequence[TokenLogprob] = ()  # the likeliest tokens at its place, best first


def scored_prompt(tokenizer: Tokenizer, token_ids: Sequence[int], scores: Matrix | None) -> list[ScoredToken]:
    """A prompt's tokens. `scores` are those of all but the first, in `HeadEvent`'s columns; None if nobody asked."""
    rows = [] if scores is None else scores.rows()
    unknown = len(token_ids) - len(rows)
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    texts = [detokenizer.push(token_id) for token_id in token_ids]
    texts[-1] += detokenizer.flush()
    tokens = [ScoredToken(token_id, text, None) for token_id, text in zip(token_ids, texts, strict=True)]
    for index, (logprob, *top) in enumerate(rows, unknown):
        half = len(top) // 2
        alternatives = [(int(token_id), finite(value)) for token_id, value in zip(top[:half], top[half:], strict=True)]
        tokens[index] = ScoredToken(token_ids[index], texts[index], finite(logprob), alternatives)
    return tokens


def finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def mean_logprob(tokens: Sequence[ScoredToken]) -> float:
    """Of generated tokens: what OpenAI and Text Generation Inference choose the best of several completions by."""
    logprobs = [token.logprob for token in tokens if token.logprob is not None]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A name that no other token has: its text, special or not, or what OpenAI writes for bytes that are none."""
    token_bytes = tokenizer.token_bytes(token_id, skip_special_tokens=False)
    if not token_bytes:
        return f"token_id:{token_id}"
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def openai_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[ScoredToken], num_top: int, text_offset: int
) -> CompletionLogprobs:
    """The `logprobs` object of OpenAI's completions; `text_offset` is where the first token begins in their text.

    `top_logprobs` hold `num_top` tokens, and the token itself if it is not among them.
    """
    offsets = []
    for token in tokens:
        offsets.append(text_offset)
        text_offset += len(token.text)
    return {
        "tokens": [token_name(tokenizer, token.token_id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top_logprobs(tokenizer, token, num_top) for token in tokens],
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[ScoredToken], num_top: int) -> ChatLogprobs:
    """The `logprobs` object of OpenAI's chat completions."""
    content: list[ChatTokenLogprob] = []
    for token in tokens:
        assert token.logprob is not None, "each generated token has one"
        top = [_named(tokenizer, token_id, logprob) for token_id, logprob in token.top[:num_top]]
        content.append({**_named(tokenizer, token.token_id, token.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def vllm_prompt_logprobs(tokenizer: Tokenizer, tokens: Sequence[ScoredToken], num_top: int) -> PromptLogprobs:
    """vLLM's `prompt_logprobs`. The rank of a token that is not among the likeliest ones asked for is not known."""
    return [_prompt_logprobs(tokenizer, token, num_top) for token in tokens]


def _top_logprobs(tokenizer: Tokenizer, token: ScoredToken, num_top: int) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    top = {token_name(tokenizer, token_id): logprob for token_id, logprob in token.top[:num_top]}
    return top | {token_name(tokenizer, token.token_id): token.logprob}


def _named(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    token_bytes = tokenizer.token_bytes(token_id, skip_special_tokens=False)
    return {"token": token_name(tokenizer, token_id), "logprob": logprob, "bytes": list(token_bytes)}


def _prompt_logprobs(tokenizer: Tokenizer, token: ScoredToken, num_top: int) -> dict[str, PromptLogprob] | None:
    if token.logprob is None:
        return None
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top, 1)}
    entries = {token.token_id: token.logprob} | dict(token.top[:num_top])
    return {
        str(token_id): {
            "logprob": logprob,
            "rank": ranks.get(token_id),
            "decoded_token": token_name(tokenizer, token_id),
        }
        for token_id, logprob in entries.items()
    }
