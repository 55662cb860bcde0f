"""`SimulatedGeneration`: the scheduler's job of a request of which only the numbers of tokens are known."""

from collections.abc import Sequence as Seq
from typing import cast

from gptj_serve.engine.backlog import Work
from gptj_serve.engine.job import Ride
from gptj_serve.engine.kv_blocks import BlockKey, BlockKeys, KVBlocks
from gptj_serve.engine.logit_editor import TokenMatcher
from gptj_serve.engine.sequence import Sequence
from gptj_serve.steps import Row, RowResult, SampleSpec
from gptj_serve.types import EngineRequest, Event, FinishReason, SamplingParams, Task, TokenEvent

_SAMPLES = [SampleSpec()]


def simulated_request(index: int, num_prompt_tokens: int, num_new_tokens: int) -> EngineRequest:
    """Its id is its index in the load; its prompt is a range, which is as long but takes no room."""
    return EngineRequest(
        request_id=str(index),
        task=Task.GENERATE,
        prompt_token_ids=cast(list[int], range(num_prompt_tokens)),
        sampling=SamplingParams(max_new_tokens=num_new_tokens, ignore_eos=True),
    )


def make_simulated_job(
    request: EngineRequest, block_size: int, eos_token_ids: frozenset[int], matcher: TokenMatcher | None, now: float
) -> "SimulatedGeneration":
    return SimulatedGeneration(request)


class UniqueKeys(BlockKeys):
    """Keys that no other sequence has: of a load's prompts, no two have a beginning in common."""

    def __init__(self, index: int) -> None:
        self._first = index << 24  # more blocks than a sequence has

    def of(self, token_ids: Seq[int], num_blocks: int) -> list[BlockKey]:
        return cast(list[BlockKey], range(self._first, self._first + num_blocks))


class SimulatedGeneration:
    """Does what `Generation` does with a plain request for exactly `max_new_tokens`, but counts instead of keeping
    tokens: `token_ids` is a range."""

    __slots__ = ("base", "joined_at_step", "last_s", "num_left", "num_output", "request", "sequence", "sequences")
    width = 1
    spec_ahead = None

    def __init__(self, request: EngineRequest) -> None:
        assert request.sampling is not None
        self.request = request
        self.sequence = Sequence(request.prompt_token_ids, UniqueKeys(int(request.request_id)))
        self.sequences = [self.sequence]
        self.num_output = 0
        self.num_left = request.sampling.max_new_tokens
        # Of its cohort:
        self.base = 0  # its tokens less the cohort's steps
        self.joined_at_step = 0
        self.last_s = 0.0  # of its last token when it joined

    @property
    def is_decoding(self) -> bool:
        return self.num_output > 0 and self.sequence.num_uncomputed <= 1

    @property
    def work_left(self) -> Work:
        return Work(self.sequence.num_uncomputed, self.num_left)

    def num_reusable(self, sequence: Sequence) -> int:
        return len(sequence.token_ids) - 1

    def draft(self, max_tokens: int) -> list[int]:
        return []

    def row(self, sequence: Sequence, end: int, draft: list[int]) -> Row:
        samples = _SAMPLES if end == len(sequence.token_ids) else []
        return Row(sequence.token_ids[sequence.num_computed : end], sequence.num_computed, [], samples=samples)

    def take(self, rides: Seq[Ride], results: Seq[RowResult], blocks: KVBlocks, now: float) -> list[Event]:
        row = rides[0].row
        if not row.samples or row.end != len(self.sequence.token_ids):
            return []
        self.grow(1)
        reason = None if self.num_left else FinishReason.LENGTH
        return [TokenEvent(self.request.request_id, self.num_output - 1, 0, 0.0, reason)]

    def grow(self, num_tokens: int) -> None:
        """So many more tokens are here."""
        self.sequence.token_ids = cast(list[int], range(len(self.sequence.token_ids) + num_tokens))
        self.num_output += num_tokens
        self.num_left -= num_tokens
