"""Stages without tensors, whose answers show every mistake in the bookkeeping of KV blocks.

Each slot of the fake cache holds (position, token, hash of the prefix up to it). A row writes its tokens through its
block table and then reads its whole context back through it; the next token is a hash of all that it read. A wrong
table, a block with another owner's or an older content, or a write out of order changes the answer, and a comparison
with `expected_events`, which knows neither blocks nor batches, fails.
"""

import math
import time
from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from gptj_serve.engine.beam_search import BeamSearch
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.steps import (
    LogitEdits,
    MicroBatch,
    Row,
    RowOutput,
    RowResult,
    SampledToken,
    SampleSpec,
    StepOutput,
)
from gptj_serve.types import (
    BeamEvent,
    EngineRequest,
    Event,
    FinishReason,
    HeadEvent,
    Matrix,
    Pooling,
    PromptEvent,
    SamplingParams,
    Task,
    TokenEvent,
    TokenLogprob,
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
    reuse_prefixes: bool = True,
    max_queue_wait_s: float = math.inf,
    schedules_ahead: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Scheduler:
    limits = SchedulerLimits(
        num_stages, max_num_sequences, max_microbatch_tokens, max_sequence_tokens, max_queue_wait_s, schedules_ahead
    )
    blocks = KVBlocks(num_blocks, block_size, reuse_prefixes=reuse_prefixes)
    return Scheduler(limits, blocks, frozenset({EOS}), clock)


def generate_request(
    request_id: str, prompt: Iterable[int], *, output: Iterable[int] = (), priority: int = 0, **sampling: object
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        task=Task.GENERATE,
        prompt_token_ids=list(prompt),
        output_token_ids=list(output),
        sampling=SamplingParams(**{"max_new_tokens": 4, **sampling}),  # type: ignore[arg-type]
        priority=priority,
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
        self._last_results: list[RowResult | None] = []

    def restart(self) -> None:
        self._slots.clear()
        self._last_id = None
        self._last_results = []

    def run(self, microbatch: MicroBatch) -> StepOutput:
        assert self._last_id is None or microbatch.microbatch_id == self._last_id + 1, "microbatches out of order"
        self._last_id = microbatch.microbatch_id
        for source, target in microbatch.block_copies:
            for offset in range(self._block_size):
                if (entry := self._slots.get(source * self._block_size + offset)) is not None:
                    self._slots[target * self._block_size + offset] = entry
        rows = [row if row.fed_from is None else self._fed(row, row.fed_from) for row in microbatch.rows]
        for row in rows:
            self._write(row)
        self._last_results = list(map(self._answer, rows, [*rows[1:], None]))
        return StepOutput(microbatch.microbatch_id, self._last_results)

    def _fed(self, row: Row, source: int) -> Row:
        result = self._last_results[source]
        assert result is not None
        assert len(row.token_ids) == len(row.samples) == 1
        return msgspec.structs.replace(row, token_ids=[result.tokens[0].token_id])

    def _slot(self, row: Row, position: int) -> int:
        return row.block_table[position // self._block_size] * self._block_size + position % self._block_size

    def _write(self, row: Row) -> None:
        before = self._slots.get(self._slot(row, row.start - 1)) if row.start else None
        prefix = before[2] if before else 0
        for position, token in enumerate(row.token_ids, row.start):
            prefix = _extended(prefix, position, token)
            self._slots[self._slot(row, position)] = (position, token, prefix)

    def _context(self, row: Row) -> list[Entry]:
        return [self._slots.get(self._slot(row, position), (-1, -1, -1)) for position in range(row.end)]

    def _answer(self, row: Row, follower: Row | None) -> RowResult | None:
        context = self._context(row)
        result = RowResult(values=_head_values(row, context))
        if row.target_token_ids:
            first = row.start + row.first_target + 1
            scores = [
                _scores(context[:end], target, row.num_top_targets)
                for end, target in enumerate(row.target_token_ids, first)
            ]
            result = msgspec.structs.replace(result, targets=Matrix.of(scores))
        if not row.samples:
            return None if result == RowResult() else result
        if row.samples[0].num_candidates:
            (spec,) = row.samples
            return RowResult(candidates=_candidates(context, spec.edits)[: spec.num_candidates])
        guide: list[Entry] = []
        if row.samples[0].guidance_scale != 1:
            assert follower is not None
            assert not follower.samples
            guide = self._context(follower)
        contexts = [context[: row.end - len(row.samples) + 1 + index] for index in range(len(row.samples))]
        tokens = [_sampled(before, spec, guide) for before, spec in zip(contexts, row.samples, strict=True)]
        return msgspec.structs.replace(result, tokens=tokens)


def _head_values(row: Row, context: list[Entry]) -> Matrix | None:
    values = [_class_logits(context[: i + 1]) for i in range(row.start, row.end)]
    match row.output:
        case RowOutput.CLASSIFY:
            return Matrix.of(values[-1:])
        case RowOutput.CLASSIFY_SUM:
            return Matrix.of(np.sum(values, axis=0, keepdims=True))
        case RowOutput.QA:
            return Matrix.of(values)
        case RowOutput.HIDDEN_LAST:
            return Matrix.of(_hidden(values[-1:]))
        case RowOutput.HIDDEN_SUM:
            return Matrix.of(_hidden(values).sum(axis=0, keepdims=True))
        case RowOutput.HIDDEN_ALL:
            return Matrix.of(_hidden(values))
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
        scores = [
            _scores(_context(whole[:i]), whole[i], request.num_top_logprobs) for i in range(len(tokens), len(whole))
        ]
        return [HeadEvent(request.request_id, Matrix.of(scores))]
    assert request.sampling is not None
    return _expected_beams(request) if request.sampling.beams is not None else _expected_text(request)


def _expected_text(request: EngineRequest) -> list[Event]:
    sampling = request.sampling
    assert sampling is not None
    prompt = request.prompt_token_ids
    tokens = [*prompt, *request.output_token_ids]
    events: list[Event] = []
    if sampling.prompt_logprobs and len(prompt) > 1:
        scores = [_scores(_context(prompt[:i]), prompt[i], sampling.num_top_logprobs) for i in range(1, len(prompt))]
        events.append(PromptEvent(request.request_id, Matrix.of(scores)))
    while not (events and is_terminal(events[-1])):
        output = tokens[len(prompt) :]
        guide = []
        if sampling.guidance_scale != 1:
            guide = _context([*(sampling.negative_prompt_token_ids or prompt[-1:]), *output])
        spec = SampleSpec(seed=sampling.seed, edits=_edits(sampling, tokens, len(output)),
                          num_top_logprobs=sampling.num_top_logprobs)  # fmt: skip
        result = _sampled(_context(tokens), spec, guide)
        tokens.append(result.token_id)
        reason = None
        if len(output) + 1 == sampling.max_new_tokens:
            reason = FinishReason.LENGTH
        if result.token_id == EOS and not sampling.ignore_eos:
            reason = FinishReason.EOS
        if result.token_id in sampling.stop_token_ids:
            reason = FinishReason.STOP
        events.append(
            TokenEvent(request.request_id, len(output), result.token_id, result.logprob, reason, result.top_logprobs)
        )
    return events


def _expected_beams(request: EngineRequest) -> list[Event]:
    sampling = request.sampling
    assert sampling is not None
    assert sampling.beams is not None
    ends = frozenset() if sampling.ignore_eos else frozenset({EOS})
    search = BeamSearch(sampling.beams, sampling.max_new_tokens, ends, frozenset(sampling.stop_token_ids))
    outputs: list[list[int]] = [[]]
    while True:
        candidates = []
        for output in outputs:
            tokens = [*request.prompt_token_ids, *output]
            candidates.append(
                _candidates(_context(tokens), _edits(sampling, tokens, len(output)))[: search.num_candidates]
            )
        chosen = search.advance(candidates)
        if chosen is None:
            return [BeamEvent(request.request_id, search.results())]
        outputs = [[*outputs[parent], token] for parent, token in chosen]


def _edits(sampling: SamplingParams, tokens: list[int], num_output: int) -> LogitEdits | None:
    """Of the processors, two that need the history: that says whether the engine keeps it right."""
    banned = {EOS, *sampling.stop_token_ids} if num_output < sampling.min_new_tokens else set()
    banned |= set(sampling.suppress_tokens)
    size = sampling.no_repeat_ngram_size
    if size:
        last = tokens[len(tokens) - size + 1 :]
        banned |= {tokens[i + size - 1] for i in range(len(tokens) - size + 1) if tokens[i : i + size - 1] == last}
    return LogitEdits(banned_token_ids=list(banned)) if banned else None


def _hidden(values: list[list[float]]) -> np.ndarray:
    return np.array(values) * 3 + 1  # unlike the logits


def _logprob(context: list[Entry], target: int) -> float:
    return -float(hash((target, *context)) % 1000)


def _top(context: list[Entry], count: int) -> list[TokenLogprob]:
    ranked = sorted(range(VOCAB_SIZE), key=lambda token: (-_logprob(context, token), token))
    return [(token, _logprob(context, token)) for token in ranked[:count]]


def _scores(context: list[Entry], target: int, num_top: int) -> list[float]:
    top = _top(context, num_top)
    return [_logprob(context, target), *(float(t) for t, _ in top), *(logprob for _, logprob in top)]


def _context(tokens: list[int]) -> list[Entry]:
    entries: list[Entry] = []
    prefix = 0
    for position, token in enumerate(tokens):
        prefix = _extended(prefix, position, token)
        entries.append((position, token, prefix))
    return entries


def _extended(prefix: int, position: int, token: int) -> int:
    return hash((prefix, position, token))  # of integers, so the same in every process


def _sampled(context: list[Entry], spec: SampleSpec, guide: list[Entry]) -> SampledToken:
    """The first token that is not banned, beginning at a hash of all that it depends on; any, if all are.

    With an odd seed most tokens are one up from their predecessor, so that drafts are often right.
    """
    banned = spec.edits.banned_token_ids if spec.edits is not None else []
    choice = hash((spec.seed, *context, -1, *guide))
    if spec.seed % 2 and choice % 8:
        choice = context[-1][1] % 4 + 1
    in_turn = [(choice + i) % VOCAB_SIZE for i in range(VOCAB_SIZE)]
    token = next((token for token in in_turn if token not in banned), in_turn[0])
    return SampledToken(token, _logprob(context, token), _top(context, spec.num_top_logprobs))


def _candidates(context: list[Entry], edits: LogitEdits | None) -> list[TokenLogprob]:
    banned = edits.banned_token_ids if edits is not None else []
    candidates = [(t, -float(hash((t, *context)) % 4093) / 512) for t in range(VOCAB_SIZE) if t not in banned]
    return sorted(candidates, key=lambda candidate: -candidate[1])


def _class_logits(context: list[Entry]) -> list[float]:
    return [float(hash(tuple(context)) % 1000), float(len(context))]
