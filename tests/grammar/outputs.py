"""Outputs that follow a grammar: all of them, or random ones that come to an end."""

import random
from collections.abc import Iterator
from pathlib import Path

from fakes import small_tokenizer

import gptj_serve
from gptj_serve.grammar import GrammarCompiler, TokenMatcher
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import Grammar, GrammarKind

TOKENIZERS = {
    "small": small_tokenizer(),
    "demo": Tokenizer.from_directory(Path(gptj_serve.__file__).parent / "demo"),
}
COMPILERS = {name: GrammarCompiler(tokenizer, tokenizer.special_token_ids) for name, tokenizer in TOKENIZERS.items()}

CLOSING = [b'"', b"}", b"]", b","]
"""What brings JSON to an end soonest."""


def matcher_of(kind: GrammarKind, text: str, tokenizer: str = "small") -> TokenMatcher:
    return COMPILERS[tokenizer].compile(Grammar(kind, text))


def allowed(matcher: TokenMatcher) -> list[int]:
    mask = matcher.allowed_mask()
    return [8 * index + bit for index, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]


def random_output(
    matcher: TokenMatcher, tokenizer: Tokenizer, choose: random.Random, max_free: int = 24, limit: int = 400
) -> str:
    """Random tokens until the grammar, or chance, ends it; after `max_free` tokens those that bring it to an end."""
    (eos_token_id,) = tokenizer.special_token_ids
    closing = [token_id for text in CLOSING for token_id in tokenizer.encode(text.decode())]
    token_ids: list[int] = []
    while not matcher.is_finished:
        possible = allowed(matcher)
        is_late = len(token_ids) >= max_free
        if eos_token_id in possible and (is_late or choose.random() < 0.2):
            break
        possible = [token_id for token_id in possible if token_id != eos_token_id]
        soonest = [token_id for token_id in closing if token_id in possible] if is_late else []
        token_ids.append(soonest[0] if soonest else choose.choice(possible))
        matcher.accept(token_ids[-1])
        assert len(token_ids) < limit, tokenizer.decode(token_ids)
    matcher.accept(eos_token_id)
    assert matcher.is_finished
    text = b"".join(map(tokenizer.token_bytes, token_ids)).decode("utf-8")  # strictly: not cut inside a character
    assert text == tokenizer.decode(token_ids)
    return text


def all_outputs(matcher: TokenMatcher, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """Every sequence of tokens up to the end. Raises `ValueError` if one leads nowhere."""
    if is_complete(matcher, tokenizer):
        yield ()
    for token_id in allowed(matcher):
        if token_id not in tokenizer.special_token_ids:
            fork = matcher.fork()
            fork.accept(token_id)
            yield from ((token_id, *rest) for rest in all_outputs(fork, tokenizer))


def spellings(data: bytes, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """Every sequence of tokens with these bytes."""
    if not data:
        yield ()
    for token_id in range(tokenizer.num_token_ids):
        token = tokenizer.token_bytes(token_id)
        if token and data.startswith(token):
            yield from ((token_id, *rest) for rest in spellings(data[len(token) :], tokenizer))


def is_complete(matcher: TokenMatcher, tokenizer: Tokenizer) -> bool:
    return any(token_id in tokenizer.special_token_ids for token_id in allowed(matcher))


def accepts(matcher: TokenMatcher, text: str, tokenizer: Tokenizer, choose: random.Random | None = None) -> bool:
    """Whether it takes the text, as the tokenizer cuts it or cut at random, to its end."""
    token_ids = tokenizer.encode(text) if choose is None else cut_at_random(text.encode(), tokenizer, choose)
    for token_id in token_ids:
        try:
            matcher.accept(token_id)
        except ValueError:
            return False
    return is_complete(matcher, tokenizer)


def cut_at_random(data: bytes, tokenizer: Tokenizer, choose: random.Random) -> list[int]:
    token_ids = []
    while data:
        tokens = ((token_id, tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.num_token_ids))
        token_id, token = choose.choice([item for item in tokens if item[1] and data.startswith(item[1])])
        token_ids.append(token_id)
        data = data[len(token) :]
    return token_ids
