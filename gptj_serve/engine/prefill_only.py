"""`PrefillOnly`: the job of a request that is answered from its tokens' hidden states or log-probabilities."""

from collections.abc import Sequence as Seq

from gptj_serve.engine.backlog import Work
from gptj_serve.engine.collecting import SumOverPositions, ValuesByPosition
from gptj_serve.engine.job import Ride
from gptj_serve.engine.kv_blocks import BlockKeys, KVBlocks
from gptj_serve.engine.sequence import Sequence
from gptj_serve.steps import Row, RowOutput, RowResult
from gptj_serve.types import EngineRequest, Event, HeadEvent, Matrix, Pooling, Task

_EMBED_OUTPUT = {
    Pooling.LAST: RowOutput.HIDDEN_LAST,
    Pooling.MEAN: RowOutput.HIDDEN_SUM,
    Pooling.ALL: RowOutput.HIDDEN_ALL,
}
_OF_LAST_TOKEN = {RowOutput.CLASSIFY, RowOutput.HIDDEN_LAST}
_SUMS = {RowOutput.CLASSIFY_SUM, RowOutput.HIDDEN_SUM}


class PrefillOnly:
    """CLASSIFY, QA, EMBED and SCORE: each chunk returns its share, and the job ends when all shares are here."""

    width = 1
    is_decoding = False
    spec_ahead = None

    def __init__(self, request: EngineRequest, block_size: int) -> None:
        self.request = request
        # No logit of a continuation's last token is wanted, so it needs no computation.
        token_ids = [*request.prompt_token_ids, *request.continuation_token_ids[:-1]]
        self.sequences = [Sequence(token_ids, BlockKeys(block_size, request.cache_salt))]
        self._output = _output_of(request)
        self._is_score = request.task is Task.SCORE
        # The first position of which something is returned: SCORE's last prompt token.
        self._first = len(request.prompt_token_ids) - 1 if self._is_score else 0
        self._by_position = ValuesByPosition(len(token_ids) - self._first)
        self._sum = SumOverPositions(len(token_ids))

    @property
    def work_left(self) -> Work:
        return Work(self.sequences[0].num_uncomputed)

    def num_reusable(self, sequence: Sequence) -> int:
        return len(sequence.token_ids) - 1 if self._output in _OF_LAST_TOKEN else self._first

    def draft(self, max_tokens: int) -> list[int]:
        return []

    def row(self, sequence: Sequence, end: int, draft: list[int]) -> Row:
        start = sequence.num_computed
        is_last = end == len(sequence.token_ids)
        targets: list[int] = []
        if self._is_score:
            targets = self.request.continuation_token_ids[max(0, start - self._first) : max(0, end - self._first)]
        return Row(
            token_ids=sequence.token_ids[start:end],
            start=start,
            block_table=sequence.block_table.copy(),
            output=self._output if is_last or self._output not in _OF_LAST_TOKEN else RowOutput.NOTHING,
            head=self.request.head,
            target_token_ids=targets,
            first_target=max(0, self._first - start) if targets else 0,
            num_top_targets=self.request.num_top_logprobs if targets else 0,
        )

    def take(self, rides: Seq[Ride], results: Seq[RowResult], blocks: KVBlocks, now: float) -> list[Event]:
        row, result = rides[0].row, results[0]
        values = self._collect(row, result.targets if self._is_score else result.values)
        return [] if values is None else [HeadEvent(self.request.request_id, values)]

    def _collect(self, row: Row, values: Matrix | None) -> Matrix | None:
        """Keep what a chunk returned; the request's answer once all of it is here."""
        if values is None or row.output in _OF_LAST_TOKEN:
            return values
        if row.output in _SUMS:
            total = self._sum.add(row.start, row.end, values.array)
            return None if total is None else Matrix.of(total / len(self.sequences[0].token_ids))
        whole = self._by_position.add(max(row.start, self._first) - self._first, values.array)
        return None if whole is None else Matrix.of(whole)


def _output_of(request: EngineRequest) -> RowOutput:
    match request.task:
        case Task.CLASSIFY:
            return RowOutput.CLASSIFY_SUM if request.pooling is Pooling.MEAN else RowOutput.CLASSIFY
        case Task.QA:
            return RowOutput.QA
        case Task.EMBED:
            return _EMBED_OUTPUT[request.pooling]
        case _:
            return RowOutput.NOTHING
