"""`Generation`: the job of a request for text that goes on token by token."""

from collections.abc import Sequence as Seq

import msgspec

from gptj_serve.engine.backlog import Work
from gptj_serve.engine.collecting import ValuesByPosition
from gptj_serve.engine.drafting import Drafter
from gptj_serve.engine.job import Ride
from gptj_serve.engine.kv_blocks import BlockKeys, KVBlocks
from gptj_serve.engine.logit_editor import LogitEditor, TokenMatcher
from gptj_serve.engine.sequence import Sequence
from gptj_serve.steps import PLACEHOLDER_TOKEN_ID, Row, RowResult, SampledToken, SampleSpec
from gptj_serve.types import (
    EngineRequest,
    Event,
    FailureEvent,
    FinishReason,
    Matrix,
    PromptEvent,
    SamplingParams,
    TokenEvent,
)


class Generation:
    """One sequence, and with guidance a second one: the guide, the same output after the negative prompt.

    A token counts only if its position is its sequence's next one. That holds for late results too: the same tokens
    before it make the same token, whoever computes it.
    """

    def __init__(
        self,
        request: EngineRequest,
        block_size: int,
        eos_token_ids: frozenset[int],
        matcher: TokenMatcher | None,
        deadline: float | None,
    ) -> None:
        assert request.sampling is not None
        self.request = request
        self._params: SamplingParams = request.sampling
        self._eos_token_ids = eos_token_ids
        self._deadline = deadline
        self._num_output = len(request.output_token_ids)
        prompts = [request.prompt_token_ids]
        if self._params.guidance_scale != 1:
            prompts.append(self._params.negative_prompt_token_ids or request.prompt_token_ids[-1:])
        self.sequences = [
            Sequence([*prompt, *request.output_token_ids], BlockKeys(block_size, request.cache_salt))
            for prompt in prompts
        ]
        self.width = len(self.sequences)
        self._editor = LogitEditor(self._params, request.prompt_token_ids, eos_token_ids, matcher)
        for token_id in request.output_token_ids:
            self._editor.push(token_id)
        num_scored = len(request.prompt_token_ids) - 1 if self._params.prompt_logprobs else 0
        self._prompt_scores: ValuesByPosition | None = ValuesByPosition(num_scored) if num_scored else None
        self._spec = SampleSpec(
            warpers=self._params.warpers,
            seed=self._params.seed,
            num_top_logprobs=self._params.num_top_logprobs,
            guidance_scale=self._params.guidance_scale,
        )
        self._drafter: Drafter | None = None
        if self._params.prompt_lookup_num_tokens:
            self._drafter = Drafter(request.prompt_token_ids, self._params.max_matching_ngram_size)
        self._goes_ahead = self.width == 1 and self._drafter is None and not self._editor.depends_on_tokens

    @property
    def spec_ahead(self) -> SampleSpec | None:
        return self._samples([PLACEHOLDER_TOKEN_ID])[-1] if self._goes_ahead else None

    @property
    def is_decoding(self) -> bool:
        if len(self.sequences) > 1:
            return all(sequence.num_uncomputed <= 1 for sequence in self.sequences)
        return self._num_output > 0 and self.sequences[0].num_uncomputed <= 1

    @property
    def work_left(self) -> Work:
        num_new = self._params.max_new_tokens - self._num_output
        if len(self.sequences) == 1:
            return Work(self.sequences[0].num_uncomputed, num_new)
        return Work(sum(sequence.num_uncomputed for sequence in self.sequences), num_new * len(self.sequences))

    def num_reusable(self, sequence: Sequence) -> int:
        is_scored = self._prompt_scores is not None and sequence is self.sequences[0]
        return 0 if is_scored else len(sequence.token_ids) - 1

    def draft(self, max_tokens: int) -> list[int]:
        if self._drafter is None:
            return []
        room = self._params.max_new_tokens - self._num_output - 1
        num_tokens = min(self._params.prompt_lookup_num_tokens, max_tokens, room)
        return self._drafter.propose(self.sequences[0].token_ids, num_tokens)

    def row(self, sequence: Sequence, end: int, draft: list[int]) -> Row:
        is_guide = sequence is not self.sequences[0]
        is_last = end == len(sequence.token_ids)
        targets = self._targets(sequence.num_computed, end) if not is_guide else []
        return Row(
            token_ids=sequence.token_ids[sequence.num_computed : end] + draft,
            start=sequence.num_computed,
            block_table=sequence.block_table.copy(),
            samples=self._samples(draft) if is_last and not is_guide else [],
            target_token_ids=targets,
            num_top_targets=self._params.num_top_logprobs if targets else 0,
        )

    def take(self, rides: Seq[Ride], results: Seq[RowResult], blocks: KVBlocks, now: float) -> list[Event]:
        ride, result = rides[0], results[0]
        events: list[Event] = []
        if result.targets is not None and self._prompt_scores is not None:
            scores = self._prompt_scores.add(ride.row.start, result.targets.array)
            if scores is not None:
                self._prompt_scores = None
                events.append(PromptEvent(self.request.request_id, Matrix.of(scores)))
        num_draft = max(0, len(ride.row.samples) - 1)
        if not result.tokens or ride.row.end - num_draft != len(self.sequences[0].token_ids):
            return events  # a chunk without a token, or a token that is here already
        draft = ride.row.token_ids[-num_draft:] if num_draft else []
        num_accepted = 0
        for index, token in enumerate(result.tokens):
            event = self._append(token, now)
            events.append(event)
            if not isinstance(event, TokenEvent) or event.finish_reason is not None:
                break
            if index == len(draft) or draft[index] != token.token_id:
                break
            num_accepted += 1
        if ride.has_kv:  # of the last token too, if nothing sound came after it; but its logits are wanted
            sequence = self.sequences[0]
            sequence.num_computed += min(num_accepted, len(result.tokens) - 1)
            sequence.publish(blocks, sequence.num_computed)  # a row made ahead may have filled a block already
        return events

    def _targets(self, start: int, end: int) -> list[int]:
        """Prompt tokens whose log-probabilities come of positions [start, end)."""
        if self._prompt_scores is None:
            return []
        return self.request.prompt_token_ids[start + 1 : end + 1]

    def _samples(self, draft: list[int]) -> list[SampleSpec]:
        samples = []
        for index in range(len(draft) + 1):
            if index:
                self._editor.push(draft[index - 1])
            edits = self._editor.edits()
            samples.append(self._spec if edits is None else msgspec.structs.replace(self._spec, edits=edits))
        self._editor.pop(len(draft))
        return samples

    def _append(self, token: SampledToken, now: float) -> TokenEvent | FailureEvent:
        for sequence in self.sequences:
            sequence.token_ids.append(token.token_id)
        self._num_output += 1
        try:
            self._editor.push(token.token_id)
        except ValueError as error:
            message = f"the token {token.token_id} breaks the grammar: {error}"
            return FailureEvent(self.request.request_id, message, is_request_at_fault=True)
        return TokenEvent(
            self.request.request_id,
            self._num_output - 1,
            token.token_id,
            token.logprob,
            self._finish_reason(token.token_id, now),
            token.top_logprobs,
        )

    def _finish_reason(self, last: int, now: float) -> FinishReason | None:
        matcher = self._editor.matcher
        if last in self._params.stop_token_ids:
            return FinishReason.STOP
        if last in self._eos_token_ids and (matcher is not None or not self._params.ignore_eos):
            return FinishReason.EOS
        if matcher is not None and matcher.is_finished:
            return FinishReason.EOS
        if self._num_output >= self._params.max_new_tokens:
            return FinishReason.LENGTH
        return FinishReason.TIME if self._deadline is not None and now >= self._deadline else None
