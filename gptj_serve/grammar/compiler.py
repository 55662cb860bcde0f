"""`GrammarCompiler`: grammars off the event loop, each once."""

import asyncio
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property

from llguidance import LLTokenizer

from gptj_serve.errors import InvalidRequestError
from gptj_serve.grammar import library
from gptj_serve.grammar.matcher import CompiledGrammar, TokenMatcher
from gptj_serve.grammar.source import to_lark
from gptj_serve.grammar.trial import Trial
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import Grammar, GrammarKind

_MAX_REASON_CHARS = 300
_MAX_VALUE_CHARS = 100


class GrammarCompiler:
    """Compiles grammars for one tokenizer, one after the other in a thread, and keeps those last used.

    Any token may stand where its text may, the plain added ones like <|extratoken_1|> too, but for special tokens
    and those that end a text. Nothing is started before the first grammar comes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[int],
        *,
        max_cached: int = 32,
        max_cached_chars: int = 1 << 20,
    ) -> None:
        self._eos_token_ids = eos_token_ids
        self._tokens = _tokens(tokenizer, eos_token_ids)
        self._max_cached = max_cached
        self._max_cached_chars = max_cached_chars
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._lock = threading.Lock()  # of the three below
        self._cached: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._pending: dict[Grammar, Future[CompiledGrammar]] = {}
        self._num_waiting: Counter[Grammar] = Counter()

    def compile(self, grammar: Grammar) -> TokenMatcher:
        """Blocks for as long as it takes: milliseconds, or seconds for a grammar that takes too much.

        Raises `InvalidRequestError` if the grammar can't be used, `RequestFailedError` if that can't be told.
        """
        with self._waiting_for(grammar) as future:
            return TokenMatcher(future.result())

    async def compile_async(self, grammar: Grammar) -> TokenMatcher:
        """`compile` for an event loop. Whoever is cancelled here leaves the grammar to others who wait for it."""
        with self._waiting_for(grammar) as compiling:
            future = asyncio.wrap_future(compiling)
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask
            return TokenMatcher(await asyncio.shield(future))

    @contextmanager
    def _waiting_for(self, grammar: Grammar) -> Iterator[Future[CompiledGrammar]]:
        """A grammar that all leave before its turn has come is not compiled."""
        with self._lock:
            self._num_waiting[grammar] += 1
            future = self._compiled(grammar)
        try:
            yield future
        finally:
            with self._lock:
                self._num_waiting[grammar] -= 1
                if not self._num_waiting[grammar]:
                    del self._num_waiting[grammar]
                    if future.cancel():
                        del self._pending[grammar]

    def _compiled(self, grammar: Grammar) -> Future[CompiledGrammar]:
        if grammar in self._cached:
            self._cached.move_to_end(grammar)
            done: Future[CompiledGrammar] = Future()
            done.set_result(self._cached[grammar])
            return done
        if grammar not in self._pending:
            self._pending[grammar] = self._thread.submit(self._compile, grammar)
        return self._pending[grammar]

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        compiled: CompiledGrammar | None = None
        try:
            compiled = self._tried(grammar)
            return compiled
        except ValueError as error:
            value, reason = _shortened(grammar.text, _MAX_VALUE_CHARS), _shortened(str(error), _MAX_REASON_CHARS)
            raise InvalidRequestError("grammar", value, reason) from None
        finally:
            with self._lock:
                del self._pending[grammar]
                if compiled is not None:
                    self._keep(grammar, compiled)

    def _tried(self, grammar: Grammar) -> CompiledGrammar:
        """Raises `ValueError` with the reason why the grammar can't be used."""
        if not self._eos_token_ids:
            raise ValueError("the model has no token that ends a text")
        source = to_lark(grammar)
        if complaint := self._trial.complaint(source):
            raise ValueError(_in_one_line(complaint, grammar.kind))
        return CompiledGrammar(self._tokenizer, source, self._eos_token_ids)

    def _keep(self, grammar: Grammar, compiled: CompiledGrammar) -> None:
        self._cached[grammar] = compiled
        while len(self._cached) > self._max_cached or sum(len(g.text) for g in self._cached) > self._max_cached_chars:
            self._cached.popitem(last=False)

    @cached_property
    def _trial(self) -> Trial:
        return Trial(self._tokens, sorted(self._eos_token_ids))

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return library.make_tokenizer(self._tokens, sorted(self._eos_token_ids))


def _tokens(tokenizer: Tokenizer, eos_token_ids: frozenset[int]) -> list[bytes]:
    """Each token's bytes, none for those that no text may contain."""
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.num_token_ids)]
    tokens += [b""] * (max(eos_token_ids, default=-1) + 1 - len(tokens))
    for token_id, token in enumerate(tokens):
        # The byte 0xFF is no UTF-8, and marks special tokens to llguidance.
        if token_id in eos_token_ids or b"\xff" in token:
            tokens[token_id] = b""
    return tokens


def _in_one_line(complaint: str, kind: GrammarKind) -> str:
    """llguidance's messages without pictures, hints to programmers and places in what we wrote ourselves."""
    first, *others = complaint.split("\n")
    reason = " ".join([first, *(line.removeprefix("error: ") for line in others if line.startswith("error: "))])
    reason = re.sub(r"; either increase .*|; consider .*|\. Enable '.*", "", reason)
    if kind is not GrammarKind.LARK:
        ours = r"(at )?\d+\(\d+\): |failed to compile JSON schema: |invalid regex \".*\" \(in regex\): "
        reason = re.sub(f"^({ours})*", "", reason)
    return reason


def _shortened(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"
