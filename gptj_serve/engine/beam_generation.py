"""`BeamGeneration`: the job of a beam search; its sequences share the KV blocks of what they have in common."""

from collections.abc import Sequence as Seq

from gptj_serve.engine.backlog import Work
from gptj_serve.engine.beam_search import BeamSearch
from gptj_serve.engine.job import Ride
from gptj_serve.engine.kv_blocks import BlockKeys, KVBlocks
from gptj_serve.engine.logit_editor import LogitEditor, TokenMatcher
from gptj_serve.engine.sequence import Sequence
from gptj_serve.errors import RequestFailedError
from gptj_serve.steps import Row, RowResult, SampleSpec
from gptj_serve.types import BeamEvent, EngineRequest, Event, FailureEvent, SamplingParams


class BeamGeneration:
    """One sequence until the prompt is computed, then as many as there are beams.

    Where a beam goes on in two ways, its blocks get a second owner; the last one is copied when one of them writes to
    it. All beams take their step in one microbatch.
    """

    spec_ahead = None

    def __init__(
        self,
        request: EngineRequest,
        block_size: int,
        eos_token_ids: frozenset[int],
        matcher: TokenMatcher | None,
        deadline: float | None,
    ) -> None:
        assert request.sampling is not None
        assert request.sampling.beams is not None
        assert not request.output_token_ids, "a beam search begins at its prompt"
        self.request = request
        self._params: SamplingParams = request.sampling
        self._deadline = deadline
        self.width = request.sampling.beams.num_beams
        ends = frozenset[int]() if self._params.ignore_eos and matcher is None else eos_token_ids
        self._search = BeamSearch(
            request.sampling.beams, self._params.max_new_tokens, ends, frozenset(self._params.stop_token_ids)
        )
        self._num_steps = 0
        self.sequences = [Sequence(request.prompt_token_ids.copy(), BlockKeys(block_size, request.cache_salt))]
        self._editors = [LogitEditor(self._params, request.prompt_token_ids, eos_token_ids, matcher)]

    @property
    def is_decoding(self) -> bool:
        return self._num_steps > 0 and all(sequence.num_uncomputed <= 1 for sequence in self.sequences)

    @property
    def work_left(self) -> Work:
        num_new = (self._params.max_new_tokens - self._num_steps) * self.width
        return Work(sum(sequence.num_uncomputed for sequence in self.sequences), num_new)

    def num_reusable(self, sequence: Sequence) -> int:
        return len(sequence.token_ids) - 1

    def draft(self, max_tokens: int) -> list[int]:
        return []

    def row(self, sequence: Sequence, end: int, draft: list[int]) -> Row:
        samples = []
        if end == len(sequence.token_ids):
            editor = self._editors[self.sequences.index(sequence)]
            samples.append(SampleSpec(edits=editor.edits(), num_candidates=self._search.num_candidates))
        return Row(
            token_ids=sequence.token_ids[sequence.num_computed : end],
            start=sequence.num_computed,
            block_table=sequence.block_table.copy(),
            samples=samples,
        )

    def take(self, rides: Seq[Ride], results: Seq[RowResult], blocks: KVBlocks, now: float) -> list[Event]:
        num_tokens = len(self.request.prompt_token_ids) + self._num_steps
        if not rides[0].row.samples or rides[0].row.end != num_tokens:
            return []  # a chunk without candidates, or a step that has been taken already
        is_late = self._deadline is not None and now >= self._deadline
        try:
            chosen = self._search.advance([result.candidates for result in results], out_of_time=is_late)
            if chosen is not None:
                self._go_on(chosen, blocks)
                return []
            return [BeamEvent(self.request.request_id, self._search.results())]
        except (ValueError, RequestFailedError) as error:
            return [FailureEvent(self.request.request_id, str(error), is_request_at_fault=True)]

    def _go_on(self, chosen: list[tuple[int, int]], blocks: KVBlocks) -> None:
        """Replace the beams by these (parent, token id) pairs."""
        sequences: list[Sequence] = []
        editors: list[LogitEditor] = []
        kept: set[int] = set()
        for parent, _ in chosen:
            is_first = parent not in kept
            kept.add(parent)
            sequences.append(self.sequences[parent] if is_first else self.sequences[parent].fork(blocks))
            editors.append(self._editors[parent] if is_first else self._editors[parent].fork())
        for index, sequence in enumerate(self.sequences):
            if index not in kept:
                blocks.release(sequence.block_table)
        self.sequences, self._editors = sequences, editors
        for (_, token_id), sequence, editor in zip(chosen, sequences, editors, strict=True):
            sequence.token_ids.append(token_id)
            editor.push(token_id)
        self._num_steps += 1
