"""The scheduler: which tokens of which sequences the next microbatch computes, and what its results mean.

There is no prefill phase and no decode phase: a sequence is schedulable iff it has tokens not yet computed. Each
microbatch takes decode rows first, at most ceil(decoding / num_stages) of them, so that sixteen sequences over four
stages run as four microbatches of four and not as one of sixteen with three stages idle; then prompt chunks up to
the token budget; then waiting sequences, as free KV blocks allow.

When blocks run out, the youngest sequence is preempted: its blocks are released at once, it goes back to the head
of the queue, and its tokens are computed again later. That is safe even while a step of it is in flight: stages run
microbatches in order, so nothing still to be written can land in a block after its next owner's.
"""

from bisect import insort
from dataclasses import dataclass

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.sequence import Sequence
from gptj_serve.errors import InvalidRequestError
from gptj_serve.types import (
    EngineRequest,
    Event,
    FailureEvent,
    HeadValues,
    MicroBatch,
    Pooling,
    Row,
    RowFailure,
    RowOutput,
    RowResult,
    SampledToken,
    StepOutput,
    Task,
    is_terminal,
)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    num_stages: int
    max_num_sequences: int
    max_microbatch_tokens: int
    max_sequence_tokens: int  # n_positions


@dataclass(frozen=True, slots=True)
class _InFlightRow:
    sequence: Sequence
    row: Row


class Scheduler:
    """Pure state: `add` and `abort` requests, `schedule` a microbatch, `update` with what came of it."""

    def __init__(self, limits: SchedulerLimits, blocks: KVBlocks, eos_token_ids: frozenset[int]) -> None:
        self.limits = limits
        self.blocks = blocks
        self._eos_token_ids = eos_token_ids
        self._sequences: dict[str, Sequence] = {}  # all unfinished ones
        self._waiting: list[Sequence] = []  # without blocks, in order of arrival
        self._running: list[Sequence] = []  # in order of arrival
        self._in_flight: dict[int, list[_InFlightRow]] = {}  # by microbatch id
        self._num_arrivals = 0
        self._next_microbatch_id = 0
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_tokens_waiting(self) -> int:
        return sum(sequence.num_uncomputed for sequence in self._sequences.values())

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises `InvalidRequestError` if it can never be finished here."""
        if request.request_id in self._sequences:
            raise InvalidRequestError("request_id", request.request_id, "is already being served")
        limit = min(self.limits.max_sequence_tokens, self.blocks.num_blocks * self.blocks.block_size)
        num_prompt = len(request.prompt_token_ids)
        num_new = request.sampling.max_new_tokens if request.sampling is not None else 0
        num_new += len(request.continuation_token_ids)
        if request.task is Task.CLASSIFY and request.pooling is Pooling.ALL:
            raise InvalidRequestError("pooling", request.pooling.value, "gives classify no single state to look at")
        if (request.task is Task.SCORE) != bool(request.continuation_token_ids):
            raise InvalidRequestError("continuation_token_ids", request.continuation_token_ids, "go with task score")
        new_field = "max_new_tokens" if request.sampling is not None else "continuation_token_ids"
        if num_prompt + num_new > limit:
            raise InvalidRequestError(
                "prompt" if num_prompt > limit else new_field,
                num_prompt if num_prompt > limit else num_new,
                f"{num_prompt} prompt tokens + {num_new} new tokens exceed the limit of {limit}",
            )
        sequence = Sequence(request, self._num_arrivals, self._eos_token_ids)
        self._num_arrivals += 1
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Drop a request and release its blocks at once; False if it is not (or no longer) here."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._drop(sequence)
        return True

    def schedule(self) -> MicroBatch | None:
        """The next microbatch, or None if nothing can be scheduled now."""
        rows: list[_InFlightRow] = []
        budget = self.limits.max_microbatch_tokens
        decode_cap = -(-sum(sequence.is_decoding for sequence in self._running) // self.limits.num_stages)
        # Both loops may preempt, which takes sequences off the end of the list they go through: a list allows that.
        for sequence in self._running:
            if len(rows) >= min(decode_cap, budget):
                break
            if sequence.is_decoding:
                self._try_schedule(sequence, 1, rows)
        budget -= len(rows)
        for sequence in self._running:
            if not sequence.is_decoding:
                budget -= self._try_schedule(sequence, budget, rows)
        while budget > 0 and (admitted := self._admit_next()) is not None:
            budget -= self._try_schedule(admitted, budget, rows)
        if not rows:
            return None
        microbatch = MicroBatch(self._next_microbatch_id, [entry.row for entry in rows])
        self._in_flight[microbatch.microbatch_id] = rows
        self._next_microbatch_id += 1
        return microbatch

    def update(self, output: StepOutput) -> list[Event]:
        """Take a microbatch's results. A token counts only if its position is its sequence's next one."""
        events: list[Event] = []
        for entry, result in zip(self._in_flight.pop(output.microbatch_id), output.rows, strict=True):
            sequence = entry.sequence
            if self._sequences.get(sequence.request_id) is not sequence or result is None:
                continue  # finished or aborted meanwhile, or a chunk without a result
            event = self._take(sequence, entry.row, result)
            if event is not None:
                events.append(event)
                if is_terminal(event):
                    self._drop(sequence)
        return events

    def reset(self) -> None:
        """After the loss of a stage: forget what is in flight and recompute every sequence (KV is gone)."""
        self._in_flight.clear()
        for sequence in reversed(self._running.copy()):
            self._preempt(sequence)

    def fail_all(self, message: str) -> list[Event]:
        """End every request with a failure."""
        events: list[Event] = [FailureEvent(request_id, message) for request_id in self._sequences]
        self._in_flight.clear()
        for sequence in list(self._sequences.values()):
            self._drop(sequence)
        return events

    def check_integrity(self) -> None:
        """Assert the invariants; tests call it after every scenario."""
        self.blocks.check_integrity([sequence.block_table for sequence in self._sequences.values()])
        assert {id(s) for s in self._sequences.values()} == {id(s) for s in [*self._waiting, *self._running]}
        assert all(not s.block_table and s.num_computed == 0 for s in self._waiting), "a waiting sequence holds KV"
        assert [s.arrival for s in self._running] == sorted(s.arrival for s in self._running)
        assert [s.arrival for s in self._waiting] == sorted(s.arrival for s in self._waiting)

    def _admit_next(self) -> Sequence | None:
        """Move the oldest waiting sequence to running if the blocks for all its tokens are free."""
        if not self._waiting or len(self._running) >= self.limits.max_num_sequences:
            return None
        sequence = self._waiting[0]
        if self.blocks.blocks_for(len(sequence.token_ids)) > self._num_blocks_unreserved():
            return None
        self._waiting.pop(0)
        insort(self._running, sequence, key=_arrival)
        return sequence

    def _num_blocks_unreserved(self) -> int:
        """Free blocks less those that running prompts have yet to take."""
        reserved = sum(
            self.blocks.blocks_for(len(s.token_ids)) - len(s.block_table) for s in self._running if s.num_uncomputed
        )
        return self.blocks.num_free - reserved

    def _try_schedule(self, sequence: Sequence, budget: int, rows: list[_InFlightRow]) -> int:
        """Append a row with up to `budget` tokens of the sequence; returns how many."""
        num_tokens = min(sequence.num_uncomputed, budget)
        if num_tokens <= 0:
            return 0
        end = sequence.num_computed + num_tokens
        while not self.blocks.extend(sequence.block_table, end):
            victim = self._running[-1]
            if any(entry.sequence is victim for entry in rows):
                return 0  # it rides in this very microbatch; the next one may preempt it
            self._preempt(victim)
            if victim is sequence:
                return 0
        output = sequence.output_after(num_tokens)
        sampled = output is RowOutput.SAMPLE
        row = Row(
            token_ids=sequence.token_ids[sequence.num_computed : end],
            start=sequence.num_computed,
            block_table=sequence.block_table.copy(),
            output=output,
            sampling=sequence.request.sampling if sampled else None,
            suppressed_token_ids=sequence.suppressed_token_ids() if sampled else [],
            head=sequence.request.head,
            target_token_ids=sequence.targets_after(num_tokens) if output is RowOutput.LOGPROBS else [],
        )
        sequence.num_computed = end
        rows.append(_InFlightRow(sequence, row))
        return num_tokens

    def _take(self, sequence: Sequence, row: Row, result: RowResult) -> Event | None:
        match result:
            case SampledToken() if row.end == len(sequence.token_ids):
                return sequence.append(result)
            case HeadValues(values):
                return sequence.add_values(row, values)
            case RowFailure(message):
                return FailureEvent(sequence.request_id, message)
        return None  # a token that a preempted sequence already has

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.blocks.release(sequence.block_table)
        sequence.num_computed = 0
        insort(self._waiting, sequence, key=_arrival)
        self.num_preemptions += 1

    def _drop(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self.blocks.release(sequence.block_table)
        (self._running if sequence in self._running else self._waiting).remove(sequence)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
