"""`CompiledGrammar`, which many outputs may follow, and `TokenMatcher`, how far one of them has come."""

import threading

from llguidance import LLMatcher, LLTokenizer

from gptj_serve.grammar import library


class CompiledGrammar:
    """A grammar that stood its trial.

    Matchers are copies of `origin`, which share the states of its lexer, made as they are needed. So they make each
    other faster, but have the limit on these states in common, too: where one hits it, all have failed.
    """

    def __init__(self, tokenizer: LLTokenizer, source: str, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._lock = threading.Lock()
        self.eos_token_ids = eos_token_ids
        self.eos_mask = sum(1 << eos for eos in eos_token_ids).to_bytes((tokenizer.vocab_size + 7) // 8, "little")
        self.origin = library.make_matcher(tokenizer, source)

    def successor(self, worn: LLMatcher) -> LLMatcher:
        """An origin with a lexer of its own for matchers of the one that has failed."""
        with self._lock:
            if self.origin is worn:
                self.origin = library.make_matcher(self._tokenizer, self._source)
            return self.origin


class TokenMatcher:
    """Which tokens may follow those accepted so far. Not for several threads at once; its forks may be in others.

    The end tokens are allowed exactly where the text is complete. After one of them, only they are.
    """

    def __init__(self, grammar: CompiledGrammar) -> None:
        """Raises `ValueError` if no text matches the grammar."""
        self._grammar = grammar
        self._origin = grammar.origin
        self._matcher = self._origin.deep_copy()
        self._token_ids: list[int] = []
        self._mask = self._next_mask()

    def allowed_mask(self) -> bytes:
        """Bit i % 8 of byte i // 8 is set if token i may come next; beyond the end none may. One at least may."""
        return self._mask

    @property
    def is_finished(self) -> bool:
        """The text is complete and can't go on."""
        return self._mask == self._grammar.eos_mask

    def accept(self, token_id: int) -> None:
        """Go on by a token. Raises `ValueError` if it is not allowed, and then stays as it was.

        Also raises it if after the token nothing can follow, not even the end, or finding that out takes too much
        effort: Lark grammars and complex regexes can lead there. Then there is no going on.
        """
        if not 0 <= token_id < 8 * len(self._mask) or not self._mask[token_id // 8] >> token_id % 8 & 1:
            raise ValueError(f"token {token_id} is not allowed here")
        if token_id in self._grammar.eos_token_ids:
            self._mask = self._grammar.eos_mask
            return
        self._token_ids.append(token_id)
        self._matcher.consume_token(token_id)
        self._mask = self._next_mask()

    def fork(self) -> "TokenMatcher":
        """An independent copy."""
        copy = object.__new__(TokenMatcher)
        copy._grammar = self._grammar
        copy._origin = self._origin
        copy._matcher = self._matcher.deep_copy()
        copy._token_ids = self._token_ids.copy()
        copy._mask = self._mask
        return copy

    def _next_mask(self) -> bytes:
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self._origin = self._grammar.successor(self._origin)
            self._matcher = self._origin.deep_copy()
            self._matcher.consume_tokens(self._token_ids)
            mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise ValueError(library.complaint(self._matcher, len(self._token_ids)))
        return mask[: len(self._grammar.eos_mask)]  # beyond it, whole words and sometimes one more
