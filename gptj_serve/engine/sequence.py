"""`Sequence`: the engine's state of one request."""

from dataclasses import dataclass, field

from gptj_serve.engine.collecting import SumOverPositions, ValuesByPosition
from gptj_serve.types import (
    EngineRequest,
    FinishReason,
    HeadEvent,
    Matrix,
    Pooling,
    Row,
    RowOutput,
    SampledToken,
    Task,
    TokenEvent,
)

_EMBED_OUTPUT = {
    Pooling.LAST: RowOutput.HIDDEN_LAST,
    Pooling.MEAN: RowOutput.HIDDEN_SUM,
    Pooling.ALL: RowOutput.HIDDEN_ALL,
}
_FINAL_ONLY = {RowOutput.SAMPLE, RowOutput.CLASSIFY, RowOutput.HIDDEN_LAST}
"""These come of a sequence's last token alone; of the others every chunk returns its own."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, how many of them have been handed to the stages, and where their KV lies.

    `num_computed` counts tokens scheduled, not returned: stages run microbatches in order, so a later microbatch
    finds the KV of an earlier one in place. A sequence is schedulable iff `num_computed < len(token_ids)`.
    """

    request: EngineRequest
    arrival: int  # order of arrival; the youngest is preempted first
    eos_token_ids: frozenset[int]
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    _num_given: int = field(init=False)  # tokens that came with the request
    _by_position: ValuesByPosition = field(init=False)
    _sum: SumOverPositions = field(init=False)

    def __post_init__(self) -> None:
        # No logit of a continuation's last token is wanted, so it needs no computation.
        given = [*self.request.prompt_token_ids, *self.request.continuation_token_ids[:-1]]
        self._num_given = len(given)
        self._by_position = ValuesByPosition(len(given) - self._first_collected)
        self._sum = SumOverPositions(len(given))
        self.token_ids = [*given, *self.request.output_token_ids]

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self._num_given

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Its prompt is computed: from now on it takes one token per step."""
        return self.num_computed >= len(self.token_ids) - 1 and self.num_output > 0

    def output_after(self, num_tokens: int) -> RowOutput:
        """What the stages shall return for the next `num_tokens` tokens."""
        output = self._output
        if output is RowOutput.LOGPROBS:
            return output if self.num_computed + num_tokens > self._first_collected else RowOutput.NOTHING
        is_final = self.num_computed + num_tokens == len(self.token_ids)
        return output if is_final or output not in _FINAL_ONLY else RowOutput.NOTHING

    def targets_after(self, num_tokens: int) -> list[int]:
        """The continuation's tokens whose log-probabilities come of the next `num_tokens` tokens."""
        first = max(0, self.num_computed - self._first_collected)
        last = max(0, self.num_computed + num_tokens - self._first_collected)
        return self.request.continuation_token_ids[first:last]

    def suppressed_token_ids(self) -> list[int]:
        """The end tokens, as long as fewer than min_new_tokens have been generated."""
        sampling = self.request.sampling
        if sampling is None or self.num_output >= sampling.min_new_tokens:
            return []
        return sorted(self.eos_token_ids.union(sampling.stop_token_ids))

    def append(self, sampled: SampledToken) -> TokenEvent:
        """Take the next token and say whether it is the last."""
        self.token_ids.append(sampled.token_id)
        index = self.num_output - 1
        return TokenEvent(self.request_id, index, sampled.token_id, sampled.logprob, self._finish_reason())

    def add_values(self, row: Row, values: Matrix) -> HeadEvent | None:
        """Keep what a chunk returned; the request's event once all of it is here."""
        if row.output in _FINAL_ONLY:
            return HeadEvent(self.request_id, values)
        if row.output in (RowOutput.HIDDEN_SUM, RowOutput.CLASSIFY_SUM):
            total = self._sum.add(row.start, row.end, values.array)
            return None if total is None else HeadEvent(self.request_id, Matrix.of(total / len(self.token_ids)))
        array = values.array
        whole = self._by_position.add(row.end - len(array) - self._first_collected, array)
        return None if whole is None else HeadEvent(self.request_id, Matrix.of(whole))

    @property
    def _first_collected(self) -> int:
        """The first position of which something is returned: a SCORE request's last prompt token, else the first."""
        return len(self.request.prompt_token_ids) - 1 if self.request.task is Task.SCORE else 0

    @property
    def _output(self) -> RowOutput:
        match self.request.task:
            case Task.GENERATE:
                return RowOutput.SAMPLE
            case Task.CLASSIFY:
                return RowOutput.CLASSIFY_SUM if self.request.pooling is Pooling.MEAN else RowOutput.CLASSIFY
            case Task.QA:
                return RowOutput.QA
            case Task.EMBED:
                return _EMBED_OUTPUT[self.request.pooling]
            case Task.SCORE:
                return RowOutput.LOGPROBS

    def _finish_reason(self) -> FinishReason | None:
        sampling = self.request.sampling
        assert sampling is not None
        last = self.token_ids[-1]
        if last in sampling.stop_token_ids:
            return FinishReason.STOP
        if last in self.eos_token_ids and not sampling.ignore_eos:
            return FinishReason.EOS
        return FinishReason.LENGTH if self.num_output >= sampling.max_new_tokens else None
