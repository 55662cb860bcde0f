"""`Sequence`: the engine's state of one request."""

from dataclasses import dataclass, field

from gptj_serve.types import (
    EngineRequest,
    FinishReason,
    HeadEvent,
    RowOutput,
    SampledToken,
    Task,
    TokenEvent,
)

_FINAL_OUTPUT = {Task.GENERATE: RowOutput.SAMPLE, Task.CLASSIFY: RowOutput.CLASSIFY, Task.QA: RowOutput.QA}


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
    qa_logits: dict[int, list[float]] = field(default_factory=dict)  # by position: chunks may come more than once

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt_token_ids, *self.request.output_token_ids]

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Its prompt is computed: from now on it takes one token per step."""
        return self.num_computed >= len(self.token_ids) - 1 and self.num_output > 0

    def output_after(self, num_tokens: int) -> RowOutput:
        """What the stages shall return for the next `num_tokens` tokens."""
        if self.request.task is Task.QA:
            return RowOutput.QA  # every token has a logit, so every chunk returns its own
        is_final = self.num_computed + num_tokens == len(self.token_ids)
        return _FINAL_OUTPUT[self.request.task] if is_final else RowOutput.NOTHING

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

    def add_qa_logits(self, start: int, logits: list[list[float]]) -> HeadEvent | None:
        """Keep a chunk's [num_tokens][2] logits; the request's event once those of all tokens are here."""
        self.qa_logits.update(enumerate(logits, start))
        if len(self.qa_logits) < len(self.token_ids):
            return None
        return HeadEvent(self.request_id, [self.qa_logits[position] for position in range(len(self.token_ids))])

    def _finish_reason(self) -> FinishReason | None:
        sampling = self.request.sampling
        assert sampling is not None
        last = self.token_ids[-1]
        if last in sampling.stop_token_ids:
            return FinishReason.STOP
        if last in self.eos_token_ids and not sampling.ignore_eos:
            return FinishReason.EOS
        return FinishReason.LENGTH if self.num_output >= sampling.max_new_tokens else None
