"""`BeamSearch`: the bookkeeping of one request's beam search, equal to transformers' `_beam_search` (do_sample=False).

It knows nothing of models or KV: the caller brings each running beam's likeliest next tokens and hears which beams run
on. Scores are sums of processed log-probabilities, in float32 and in transformers' order of operations, so that
comparisons fall the same way.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptj_serve.errors import RequestFailedError
from gptj_serve.types import Beam, BeamParams, EarlyStopping, FinishReason, TokenLogprob

_FLOAT32 = np.finfo(np.float32)


@dataclass(slots=True, frozen=True)
class _Extension:
    """A running beam with one more token; `score` is the sum of its log-probabilities."""

    parent: int
    token_id: int
    score: np.float32


class BeamSearch:
    """Which beams run on, which hypotheses are finished, and when the search is over.

    In each step all extensions of running beams are ranked by score. An extension stops at an end or stop token, at
    `max_new_tokens` or when time is up. Those among the best `num_beams` that stop are finished hypotheses, of which
    the best `num_beams` by score / length ** length_penalty are kept; the best `num_beams` that don't stop run on.
    The search is over when nothing runs on, or when `num_beams` hypotheses are kept and, by `early_stopping`,

    - FIRST: at once;
    - HEURISTIC: the best running beam, were it finished as it is, would not displace one of them;
    - NEVER: the same, with `max_new_tokens` for its length if `length_penalty` is above 0.

    Where constraints leave too few extensions, transformers fills up with copies of beams and with beams that have
    stopped, all with scores of -1e9 or less, and counts even those as finished when they end (again). Here every beam
    is a real one: fewer run, and there may be fewer results than were asked for.
    """

    def __init__(
        self,
        params: BeamParams,
        max_new_tokens: int,
        eos_token_ids: frozenset[int],
        stop_token_ids: frozenset[int],
    ) -> None:
        self._params = params
        self._max_new_tokens = max_new_tokens
        self._eos_token_ids = eos_token_ids
        self._stop_token_ids = stop_token_ids
        self._num_tokens = 0
        self._scores = np.zeros(1, np.float32)  # of the running beams
        self._finished: list[Beam] = []  # best first, at most num_beams; of equal ones the older first
        self.running: list[list[int]] = [[]]
        """The output tokens of the running beams, best first: at first one beam without any, none when all is over."""

    @property
    def num_candidates(self) -> int:
        """How many (token, processed log-probability) each running beam must bring, if it has so many finite ones.

        Enough for its best `num_beams` extensions that don't stop. transformers ranks the best
        max(2, 1 + num_end_tokens) * num_beams extensions of all beams, among which the same ones are chosen.
        """
        return self._params.num_beams + len(self._eos_token_ids | self._stop_token_ids)

    def advance(
        self, candidates: Sequence[Sequence[TokenLogprob]], *, out_of_time: bool = False
    ) -> list[tuple[int, int]] | None:
        """Take one step: one list of candidates for each running beam, in any order, without those at -inf.

        Returns (index of the parent in `running` as it was, token id) for each beam that runs now, best first and at
        most `num_beams` of them; or None: the search is over. A beam without candidates ends without a result. With
        `out_of_time` this is the last step, as with transformers' `MaxTimeCriteria`.
        """
        assert self.running, "the search is over"
        self._num_tokens += 1
        going_on: list[_Extension] = []
        for rank, extension in enumerate(self._ranked(candidates)):
            reason = self._finish_reason(extension.token_id, out_of_time)
            if reason is None:
                going_on.append(extension)
            elif rank < self._params.num_beams:
                self._finish(extension, reason)
            if len(going_on) == self._params.num_beams:
                break
        self._finished.sort(key=lambda beam: beam.score, reverse=True)  # stable
        del self._finished[self._params.num_beams :]
        if not going_on or self._is_decided(going_on[0].score):
            self.running = []
            return None
        self._scores = np.array([extension.score for extension in going_on])
        self.running = [[*self.running[extension.parent], extension.token_id] for extension in going_on]
        return [(extension.parent, extension.token_id) for extension in going_on]

    def results(self) -> list[Beam]:
        """The best hypotheses of a search that is over, best first: as many as were asked for, if there are so many.

        End and stop tokens are a part of them, as in transformers. Raises `RequestFailedError` if there are none since
        no beam had a token left that it could take; transformers returns the bare prompt then.
        """
        assert not self.running, "the search is not over"
        if not self._finished:
            raise RequestFailedError(
                f"no beam could be finished: the constraints leave no token to follow {self._num_tokens - 1} tokens"
            )
        return self._finished[: self._params.num_return_sequences]

    def _ranked(self, candidates: Sequence[Sequence[TokenLogprob]]) -> Iterator[_Extension]:
        """All extensions of running beams, best first; of equal ones those of the better beam first."""
        assert len(candidates) == len(self.running), "each running beam must bring candidates"
        parents = np.repeat(np.arange(len(candidates)), [len(beam) for beam in candidates])
        token_ids = [token_id for beam in candidates for token_id, _ in beam]
        logprobs = np.array([logprob for beam in candidates for _, logprob in beam], np.float32)
        with np.errstate(over="ignore"):
            scores = np.clip(self._scores[parents] + logprobs, _FLOAT32.min, _FLOAT32.max)
        for index in np.argsort(-scores, kind="stable"):
            yield _Extension(int(parents[index]), token_ids[index], scores[index])

    def _finish_reason(self, token_id: int, out_of_time: bool) -> FinishReason | None:
        if token_id in self._stop_token_ids:
            return FinishReason.STOP
        if token_id in self._eos_token_ids:
            return FinishReason.EOS
        if self._num_tokens >= self._max_new_tokens:
            return FinishReason.LENGTH
        return FinishReason.TIME if out_of_time else None

    def _finish(self, extension: _Extension, reason: FinishReason) -> None:
        token_ids = [*self.running[extension.parent], extension.token_id]
        self._finished.append(Beam(token_ids, self._normalized(extension.score, self._num_tokens), reason))

    def _is_decided(self, best_running_score: np.float32) -> bool:
        """No hypothesis that is still to come counts, by the measure of `early_stopping`."""
        if len(self._finished) < self._params.num_beams:
            return False
        if self._params.early_stopping is EarlyStopping.FIRST:
            return True
        to_the_end = self._params.early_stopping is EarlyStopping.NEVER and self._params.length_penalty > 0
        num_tokens = self._max_new_tokens if to_the_end else self._num_tokens
        return self._normalized(best_running_score, num_tokens) <= self._finished[-1].score

    def _normalized(self, score: np.float32, num_tokens: int) -> float:
        """score / num_tokens ** length_penalty, kept finite however extreme the penalty."""
        try:
            divisor = num_tokens**self._params.length_penalty
        except OverflowError:
            divisor = sys.float_info.max
        divisor = min(max(divisor, float(_FLOAT32.tiny)), float(_FLOAT32.max))
        with np.errstate(over="ignore"):
            return float(np.clip(score / np.float32(divisor), _FLOAT32.min, _FLOAT32.max))
