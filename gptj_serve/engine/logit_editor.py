"""`LogitEditor`: what stands between a sequence's next logits and the choice of its next token.

It keeps the sequence's history in the form that the processors need, so that a step costs no pass over all tokens.
Each processor follows the transformers class of its name in `transformers.generation.logits_process`; `LogitEdits`
has the order. What transformers lacks follows vLLM: presence and frequency penalties, stop and allowed token ids.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol, Self

from gptj_serve.steps import LogitEdits
from gptj_serve.types import SamplingParams


class TokenMatcher(Protocol):
    """A grammar and how far the output has come in it."""

    def allowed_mask(self) -> bytes:
        """Bit i % 8 of byte i // 8 is set if token i may come next; beyond the end none may."""

    def accept(self, token_id: int) -> None:
        """Go on by a token. Raises `ValueError` if it is not allowed."""

    @property
    def is_finished(self) -> bool:
        """The text is complete and can't go on."""

    def fork(self) -> "TokenMatcher":
        """An independent copy."""


class LogitEditor:
    """Follows one sequence: `push` each token that it gets; `pop` takes back tokens that were only a draft."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        eos_token_ids: frozenset[int],
        matcher: TokenMatcher | None = None,
    ) -> None:
        self._rules = _Rules(params, eos_token_ids, len(prompt_token_ids), matcher is not None)
        self.matcher = matcher
        self._token_ids: list[int] = []
        self._counts: Counter[int] = Counter()
        self._output_counts: Counter[int] = Counter()
        # By the n - 1 tokens before: what followed in the prompt, which all forks share, and in the output.
        self._prompt_followers: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        self._followers = self._prompt_followers
        if self._rules.is_active:
            for token_id in prompt_token_ids:
                self._extend(token_id)
        self._followers = defaultdict(list)

    @property
    def num_output(self) -> int:
        return len(self._token_ids) - self._rules.num_prompt

    @property
    def depends_on_tokens(self) -> bool:
        """Edits are for the tokens that came before, and not only for how many there were."""
        return self._rules.depends_on_tokens

    def push(self, token_id: int) -> None:
        if self._rules.is_active:
            self._extend(token_id)
            self._output_counts[token_id] += 1
            if self.matcher is not None and not self.matcher.is_finished:
                self.matcher.accept(token_id)

    def pop(self, num_tokens: int) -> None:
        """Take back the last tokens; not with a matcher, which only goes forward."""
        if not num_tokens or not self._rules.is_active:
            return
        assert self.matcher is None
        for _ in range(num_tokens):
            if self._rules.ngram_size and len(self._token_ids) >= self._rules.ngram_size:
                self._followers[self._ngram_before(len(self._token_ids) - 1)].pop()
            token_id = self._token_ids.pop()
            for counts in (self._counts, self._output_counts):
                counts[token_id] -= 1
                if not counts[token_id]:
                    del counts[token_id]

    def fork(self) -> Self:
        copy = object.__new__(type(self))
        copy._rules = self._rules
        copy.matcher = self.matcher.fork() if self.matcher is not None else None
        copy._token_ids = self._token_ids.copy()
        copy._counts = self._counts.copy()
        copy._output_counts = self._output_counts.copy()
        copy._prompt_followers = self._prompt_followers
        copy._followers = defaultdict(list, {ngram: ids.copy() for ngram, ids in self._followers.items()})
        return copy

    def edits(self) -> LogitEdits | None:
        """For the next token; None if its logits stay as they are."""
        rules, params = self._rules, self._rules.params
        if not rules.is_active:
            return None
        if forced := self._forced():
            return LogitEdits(forced_token_ids=forced)
        has_output_penalty = params.presence_penalty != 0 or params.frequency_penalty != 0
        boost = self._boost()
        edits = LogitEdits(
            biases=self._biases(),
            repetition_penalty=params.repetition_penalty,
            seen_token_ids=list(self._counts) if params.repetition_penalty != 1 else [],
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            output_counts=list(self._output_counts.items()) if has_output_penalty else [],
            banned_token_ids=self._banned(),
            allowed_mask=self._allowed_mask(),
            boosted_token_ids=rules.eos_token_ids if boost else [],
            boost=boost,
        )
        return None if edits == _NOTHING else edits

    def _extend(self, token_id: int) -> None:
        self._token_ids.append(token_id)
        self._counts[token_id] += 1
        if self._rules.ngram_size and len(self._token_ids) >= self._rules.ngram_size:
            self._followers[self._ngram_before(len(self._token_ids) - 1)].append(token_id)

    def _ngram_before(self, position: int) -> tuple[int, ...]:
        return tuple(self._token_ids[position - self._rules.ngram_size + 1 : position])

    def _ends_with_prefix_of(self, token_ids: Sequence[int]) -> bool:
        """All but the last of `token_ids` came just now."""
        num_prefix = len(token_ids) - 1
        if num_prefix == 0:
            return True
        return self._token_ids[-1] == token_ids[-2] and self._token_ids[-num_prefix:] == token_ids[:-1]

    def _forced(self) -> list[int]:
        params = self._rules.params
        forced: list[int] = []
        if params.forced_bos_token_id is not None and len(self._token_ids) == 1:
            forced = [params.forced_bos_token_id]
        if params.forced_eos_token_id and self.num_output == params.max_new_tokens - 1:
            forced = params.forced_eos_token_id
        suppressed = {*params.suppress_tokens, *self._suppressed_at_begin()}
        return [token_id for token_id in forced if token_id not in suppressed]

    def _suppressed_at_begin(self) -> list[int]:
        is_begin = len(self._token_ids) == self._rules.begin_index
        return self._rules.params.begin_suppress_tokens if is_begin else []

    def _boost(self) -> float:
        """`ExponentialDecayLengthPenalty`, from as many tokens after the prompt as it starts with."""
        if self._rules.params.exponential_decay_length_penalty is None:
            return 0.0
        start, factor = self._rules.params.exponential_decay_length_penalty
        try:
            return factor ** (self.num_output - start) - 1.0 if self.num_output > start else 0.0
        except OverflowError:
            return math.inf

    def _biases(self) -> list[tuple[int, float]]:
        sums: defaultdict[int, float] = defaultdict(float)
        for token_ids, bias in self._rules.params.sequence_bias:
            if self._ends_with_prefix_of(token_ids):
                sums[token_ids[-1]] += bias
        return list(sums.items())

    def _banned(self) -> list[int]:
        rules, params = self._rules, self._rules.params
        banned = set(params.suppress_tokens)
        if rules.ngram_size and len(self._token_ids) + 1 >= rules.ngram_size:
            last = self._ngram_before(len(self._token_ids))
            banned.update(self._prompt_followers.get(last, ()), self._followers.get(last, ()))
        banned.update(ids[-1] for ids in rules.bad_words_ids if self._ends_with_prefix_of(ids))
        if self.num_output < params.min_new_tokens:
            banned.update(rules.eos_token_ids, params.stop_token_ids)
        banned.update(self._suppressed_at_begin())
        return list(banned)

    def _allowed_mask(self) -> bytes:
        mask = self._rules.allowed_mask
        if self.matcher is None:
            return mask
        of_grammar = self.matcher.allowed_mask()
        if not mask:
            return of_grammar
        num_bytes = max(1, min(len(mask), len(of_grammar)))
        both = int.from_bytes(mask[:num_bytes], "little") & int.from_bytes(of_grammar[:num_bytes], "little")
        return both.to_bytes(num_bytes, "little")


_NOTHING = LogitEdits()


class _Rules:
    """What of the parameters stays the same for all tokens of a request."""

    def __init__(
        self, params: SamplingParams, eos_token_ids: frozenset[int], num_prompt: int, has_matcher: bool
    ) -> None:
        self.params = params
        self.eos_token_ids = sorted(eos_token_ids)
        self.num_prompt = num_prompt
        self.ngram_size = params.no_repeat_ngram_size
        # `NoBadWordsLogitsProcessor` drops words that are an end token alone.
        self.bad_words_ids = [ids for ids in params.bad_words_ids if not (len(ids) == 1 and ids[0] in eos_token_ids)]
        has_forced_bos = params.forced_bos_token_id is not None and num_prompt == 1
        self.begin_index = num_prompt + has_forced_bos
        self.allowed_mask = _mask(params.allowed_token_ids) if params.allowed_token_ids is not None else b""
        self.is_active = has_matcher or any(
            getattr(params, name) != default for name, default in _EDITING_DEFAULTS.items()
        )
        sequences = [*self.bad_words_ids, *(token_ids for token_ids, _ in params.sequence_bias)]
        has_penalty = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        self.depends_on_tokens = (
            has_matcher or has_penalty or self.ngram_size > 0 or any(len(token_ids) > 1 for token_ids in sequences)
        )


_EDITING_DEFAULTS = {
    "min_new_tokens": 0,
    "sequence_bias": [],
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "allowed_token_ids": None,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": [],
    "exponential_decay_length_penalty": None,
}


def _mask(token_ids: Iterable[int]) -> bytes:
    mask = bytearray(max(token_ids, default=0) // 8 + 1)
    for token_id in token_ids:
        mask[token_id // 8] |= 1 << token_id % 8
    return bytes(mask)
