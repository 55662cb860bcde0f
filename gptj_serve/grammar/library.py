"""All that is used of llguidance (https://github.com/guidance-ai/llguidance), and a trial of a grammar's worth.

This file is also the program of the process in which grammars are tried out, see `trial`. That process is to start
fast and to hold little, so nothing of this package is imported here.
"""

import contextlib
import json
import math
import random
import resource
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

LIMITS = LLParserLimits(
    step_max_items=10_000,  # of the parser, for one mask; JSON needs some hundreds
    max_lexer_states=50_000,  # about half a kilobyte each, kept as long as the grammar
    verbose_errors=False,  # or messages repeat the whole grammar
)
"""The others are llguidance's defaults: about 20 ms of lexing for a grammar, as much for a mask, 2000 items in a row.

They count some kinds of work only, so compiling a grammar within them can take minutes. Hence the limits below.
"""

TRIAL_NUM_TOKENS = 32
CPU_LIMIT_S = 2
MEMORY_LIMIT_BYTES = 1 << 30  # of addresses; the process has 60 MB of them before the first grammar
STACK_LIMIT_BYTES = 2 << 20  # a quarter of what a thread usually has, which then compiles the grammar in earnest

_NO_FORCING = '\n%llguidance {"no_forcing": true}'
"""Else a mask allows only the usual tokens for bytes that must come, although others spell them as well."""


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: Sequence[bytes], eos_token_ids: Sequence[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = eos_token_ids[0]

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("nothing is tokenized without forcing")


def make_tokenizer(tokens: Sequence[bytes], eos_token_ids: Sequence[int]) -> LLTokenizer:
    """Tokens without bytes are never allowed, but for the end tokens where the text is complete."""
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokens, eos_token_ids)), eos_token=list(eos_token_ids))


def make_matcher(tokenizer: LLTokenizer, source: str) -> LLMatcher:
    """`source` is Lark as llguidance knows it. Never raises: `LLMatcher.is_error` tells."""
    # Not as a mere string: one that begins with a brace would be taken for llguidance's internal format.
    grammar = json.dumps({"grammars": [{"lark_grammar": source + _NO_FORCING}]})
    return LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)


def try_out(tokenizer: LLTokenizer, source: str) -> str:
    """Compile a grammar and walk a few random tokens into it; returns llguidance's complaint, or nothing.

    The walk finds most of what compiling doesn't: too many alternatives at one place, dead ends, slow masks.
    """
    matcher = make_matcher(tokenizer, source)
    if matcher.is_error():
        return matcher.get_error()
    if warnings := matcher.get_grammar_warnings():  # what llguidance would rather ignore
        return "; ".join(warnings)
    choose = random.Random(0)  # noqa: S311 (any tokens do)
    for num_tokens in range(TRIAL_NUM_TOKENS):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            return complaint(matcher, num_tokens)
        token_id = _any_allowed(mask, choose)
        if token_id in tokenizer.eos_tokens:
            break
        if not matcher.consume_token(token_id):
            return complaint(matcher, num_tokens)
    return ""


def complaint(matcher: LLMatcher, num_tokens: int) -> str:
    """Why no mask can be had of a matcher, after so many tokens."""
    if matcher.get_error().startswith("NoExtension"):
        return "no text matches it" if num_tokens == 0 else f"after {num_tokens} tokens nothing can follow"
    return matcher.get_error()


def _any_allowed(mask: bytes, choose: random.Random) -> int:
    """The first one from a random byte on. A mask always allows a token."""
    start = choose.randrange(len(mask))
    index = next(i % len(mask) for i in range(start, start + len(mask)) if mask[i % len(mask)])
    return 8 * index + choose.choice([bit for bit in range(8) if mask[index] >> bit & 1])


def main() -> None:
    """Answer each grammar with what `try_out` says, until the connection ends or a limit is hit."""
    with Connection(int(sys.argv[1])) as connection:
        _limit(resource.RLIMIT_AS, MEMORY_LIMIT_BYTES)
        _limit(resource.RLIMIT_STACK, STACK_LIMIT_BYTES)
        _limit(resource.RLIMIT_CORE, 0)
        tokenizer = make_tokenizer(*msgspec.msgpack.decode(connection.recv_bytes(), type=tuple[list[bytes], list[int]]))
        connection.send_bytes(b"")
        with contextlib.suppress(EOFError):
            while True:
                source = connection.recv_bytes().decode()
                usage = resource.getrusage(resource.RUSAGE_SELF)
                _limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime) + CPU_LIMIT_S)
                connection.send_bytes(try_out(tokenizer, source).encode())


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    with contextlib.suppress(ValueError):  # a stricter limit stands already, or the system knows none
        resource.setrlimit(which, (value, hard))


if __name__ == "__main__":
    main()
