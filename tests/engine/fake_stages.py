"""Stages without tensors, whose answers show every mistake in the bookkeeping of KV blocks.

Each slot of the fake cache holds (position, token, hash of the prefix up to it). A row writes its tokens through its
block table and then reads its whole context back through it; the next token is a hash of all that it read. A wrong
table, a block with another owner's or an older content, or a write out of order changes the answer, and a comparison
with `expected_events`, which knows neither blocks nor batches, fails.
"""

from collections.abc import Iterable

import numpy as np

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.types import (
    EngineRequest,
    Event,
    FinishReason,
    HeadEvent,
    HeadValues,
    Matrix,
    MicroBatch,
    Pooling,
    Row,
    RowOutput,
    RowResult,
    SampledToken,
    SamplingParams,
    StepOutput,
    Task,
    TokenEvent,
    is_terminal,
)

VOCAB_SIZE = 11
EOS = 0
Entry = tuple[int, int, int]  # position, token, hash of the prefix


def make_scheduler(
    *,
    num_stages: int = 1,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_sequences: int = 64,
    max_microbatch_tokens: int = 64,
    max_sequence_tokens: int = 64,
) -> Scheduler:
    limits = SchedulerLimits(num_stages, max_num_sequences, max_microbatch_tokens, max_sequence_tokens)
    return Scheduler(limits, KVBlocks(num_blocks, block_size), frozenset({EOS}))


def generate_request(
    request_id: str, prompt: Iterable[int], *, output: Iterable[int] = (), **sampling: object
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        task=Task.GENERATE,
        prompt_token_ids=list(prompt),
        output_token_ids=list(output),
        sampling=SamplingParams(**{"max_new_tokens": 4, **sampling}),  # type: ignore[arg-type]
    )


def head_request(
    request_id: str,
    task: Task,
    prompt: Iterable[int],
    pooling: Pooling = Pooling.LAST,
    continuation: Iterable[int] = (),
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        task=task,
        prompt_token_ids=list(prompt),
        pooling=pooling,
        continuation_token_ids=list(continuation),
    )


HEAD_TASKS = [
    (Task.CLASSIFY, Pooling.LAST),
    (Task.CLASSIFY, Pooling.MEAN),
    (Task.QA, Pooling.LAST),
    (Task.EMBED, Pooling.LAST),
    (Task.EMBED, Pooling.MEAN),
    (Task.EMBED, Pooling.ALL),
    (Task.SCORE, Pooling.LAST),
]
"""All that ends without a token, with what distinguishes it."""


class FakeStages:
    """All stages as one: they share block ids and order, so what holds for one holds for all."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._slots: dict[int, Entry] = {}
        self._last_id: int | None = None

    def restart(self) -> None:
        self._slots.clear()
        self._last_id = None

    def run(self, microbatch: MicroBatch) -> StepOutput:
        assert self._last_id is None or microbatch.microbatch_id == self._last_id + 1, "microbatches out of order"
        self._last_id = microbatch.microbatch_id
        for row in microbatch.rows:
            self._write(row)
        return StepOutput(microbatch.microbatch_id, [self._answer(row) for row in microbatch.rows])

    def _slot(self, row: Row, position: int) -> int:
        return row.block_table[position // self._block_size] * self._block_size + position % self._block_size

    def _write(self, row: Row) -> None:
        before = self._slots.get(self._slot(row, row.start - 1)) if row.start else None
        prefix = before[2] if before else 0
        for position, token in enumerate(row.token_ids, row.start):
            prefix = _extended(prefix, position, token)
            self._slots[self._slot(row, position)] = (position, token, prefix)

    def _answer(self, row: Row) -> RowResult:
        context = [self._slots.get(self._slot(row, position), (-1, -1, -1)) for position in range(row.end)]
        values = [_class_logits(context[: i + 1]) for i in range(row.start, row.end)]
        match row.output:
            case RowOutput.SAMPLE:
                assert row.sampling is not None
                return _sampled(context, row.sampling, row.suppressed_token_ids)
            case RowOutput.CLASSIFY:
                return HeadValues(Matrix.of(values[-1:]))
            case RowOutput.CLASSIFY_SUM:
                return HeadValues(Matrix.of(np.sum(values, axis=0, keepdims=True)))
            case RowOutput.QA:
                return HeadValues(Matrix.of(values))
            case RowOutput.HIDDEN_LAST:
                return HeadValues(Matrix.of(_hidden(values[-1:])))
            case RowOutput.HIDDEN_SUM:
                return HeadValues(Matrix.of(_hidden(values).sum(axis=0, keepdims=True)))
            case RowOutput.HIDDEN_ALL:
                return HeadValues(Matrix.of(_hidden(values)))
            case RowOutput.LOGPROBS:
                first = row.end - len(row.target_token_ids)
                return HeadValues(
                    Matrix.of([_logprob(context[:end], t) for end, t in enumerate(row.target_token_ids, first + 1)])
                )
        return None


def expected_events(request: EngineRequest) -> list[Event]:
    """The right answer, from the definition of the request alone."""
    tokens = [*request.prompt_token_ids, *request.output_token_ids]
    if request.task is Task.CLASSIFY and request.pooling is Pooling.MEAN:
        logits = [_class_logits(_context(tokens[: i + 1])) for i in range(len(tokens))]
        return [HeadEvent(request.request_id, Matrix.of(np.mean(logits, axis=0, keepdims=True)))]
    if request.task is Task.CLASSIFY:
        return [HeadEvent(request.request_id, Matrix.of([_class_logits(_context(tokens))]))]
    if request.task is Task.QA:
        logits = [_class_logits(_context(tokens[: i + 1])) for i in range(len(tokens))]
        return [HeadEvent(request.request_id, Matrix.of(logits))]
    if request.task is Task.EMBED:
        hidden = _hidden([_class_logits(_context(tokens[: i + 1])) for i in range(len(tokens))])
        pooled = {
            Pooling.LAST: hidden[-1:],
            Pooling.MEAN: hidden.mean(axis=0, keepdims=True),
            Pooling.ALL: hidden,
        }
        return [HeadEvent(request.request_id, Matrix.of(pooled[request.pooling]))]
    if request.task is Task.SCORE:
        whole = [*tokens, *request.continuation_token_ids]
        logprobs = [_logprob(_context(whole[:i]), whole[i]) for i in range(len(tokens), len(whole))]
        return [HeadEvent(request.request_id, Matrix.of(logprobs))]
    sampling = request.sampling
    assert sampling is not None
    events: list[Event] = []
    while not (events and is_terminal(events[-1])):
        index = len(tokens) - len(request.prompt_token_ids)
        suppressed = [EOS, *sampling.stop_token_ids] if index < sampling.min_new_tokens else []
        result = _sampled(_context(tokens), sampling, suppressed)
        tokens.append(result.token_id)
        reason = None
        if index + 1 == sampling.max_new_tokens:
            reason = FinishReason.LENGTH
        if result.token_id == EOS and not sampling.ignore_eos:
            reason = FinishReason.EOS
        if result.token_id in sampling.stop_token_ids:
            reason = FinishReason.STOP
        events.append(TokenEvent(request.request_id, index, result.token_id, result.logprob, reason))
    return events


def _hidden(values: list[list[float]]) -> np.ndarray:
    return np.array(values) * 3 + 1  # unlike the logits


def _logprob(context: list[Entry], target: int) -> list[float]:
    return [-float(hash((target, *context)) % 1000)]


def _context(tokens: list[int]) -> list[Entry]:
    entries: list[Entry] = []
    prefix = 0
    for position, token in enumerate(tokens):
        prefix = _extended(prefix, position, token)
        entries.append((position, token, prefix))
    return entries


def _extended(prefix: int, position: int, token: int) -> int:
    return hash((prefix, position, token))  # of integers, so the same in every process


def _sampled(context: list[Entry], sampling: SamplingParams, suppressed: list[int]) -> SampledToken:
    choice = hash((sampling.seed, *context))
    token = next(t for t in (choice + i for i in range(VOCAB_SIZE)) if t % VOCAB_SIZE not in suppressed) % VOCAB_SIZE
    return SampledToken(token, -float(choice % 1000))


def _class_logits(context: list[Entry]) -> list[float]:
    return [float(hash(tuple(context)) % 1000), float(len(context))]
