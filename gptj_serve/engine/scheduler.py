"""The scheduler: which tokens of which sequences the next microbatch computes, and whom its results go to.

There is no prefill phase and no decode phase: a sequence is schedulable iff it has tokens not yet computed. Each
microbatch takes decode rows first, at most ceil(decoding / num_stages) of them, so that sixteen sequences over four
stages run as four microbatches of four and not as one of sixteen with three stages idle; then prompt chunks up to
the token budget, or smaller ones where all prompts together would leave stages idle; then waiting requests, as free
KV blocks allow. So a long prompt delays the tokens of others by a microbatch of `max_microbatch_tokens` at a time, and
no more.

Requests are served in the order of their rank: arrival, moved by `PRIORITY_STEP` places for each step of priority.
Whatever arrives later than that many requests ranks behind, so nobody waits for ever.

When blocks run out, the last in rank is preempted: its blocks are released at once, it goes back to the queue, and
its tokens are computed again later. That is safe even while a step of it is in flight: stages run microbatches in
order, so nothing still to be written can land in a block after its next owner's.

A request that would wait for longer than it may is refused when it comes, and one that has done so, because the
estimate was wrong, is not begun: what is computed for a client that has given up is lost for all others.

What was in flight when a stage was lost may be the cause. Who is under suspicion more than once, without a token in
between, is computed alone from then on, until it gets further: so the innocent are soon told from the guilty.
"""

import logging
import math
import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice

from gptj_serve.engine.admission import MakeJob, check_fits, make_job, max_blocks
from gptj_serve.engine.ahead import fed_row, feeds_of, is_fed
from gptj_serve.engine.backlog import NO_WORK, Work
from gptj_serve.engine.job import Job, Ride
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.logit_editor import TokenMatcher
from gptj_serve.engine.milestones import Milestone, OnMilestone, ignore
from gptj_serve.engine.sequence import Sequence
from gptj_serve.engine.step import MAX_LOSSES_TOGETHER, Entry, Feed, Step
from gptj_serve.engine.waiting_queue import WaitingQueue
from gptj_serve.errors import InvalidRequestError
from gptj_serve.scaling.policy import PipelineLoad
from gptj_serve.steps import MicroBatch, RowResult, StepOutput
from gptj_serve.types import PRIORITY_STEP, EngineRequest, Event, FailureEvent, TokenEvent, is_terminal


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    num_stages: int
    max_num_sequences: int
    max_microbatch_tokens: int
    max_sequence_tokens: int  # n_positions
    max_queue_wait_s: float = math.inf
    schedules_ahead: bool = False

    def __post_init__(self) -> None:
        assert self.num_stages == 1 or not self.schedules_ahead, "several stages have other microbatches to work on"

    @property
    def max_in_flight(self) -> int:
        """Microbatches."""
        return self.num_stages + self.schedules_ahead


logger = logging.getLogger(__name__)

MIN_CHUNK_TOKENS = 128
"""Of prompts in a microbatch, if there are more: with fewer a stage would read its weights for longer than it computes
with them."""

CHUNKS_PER_STAGE = 2
"""Of all prompts that wait, at least: for c chunks, n stages take (c + n - 1) / (c n) of the time that one would."""

MAX_LOSSES = 4
"""Losses of the pipeline in a row, while it computed a request, after which the request is given up here."""


class Scheduler:
    """Pure state: `add` and `abort` requests, `schedule` a microbatch, `update` with what came of it."""

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: KVBlocks,
        eos_token_ids: frozenset[int],
        clock: Callable[[], float] = time.monotonic,
        on_milestone: OnMilestone = ignore,
        make_job: MakeJob = make_job,
    ) -> None:
        self.limits = limits
        self.blocks = blocks
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._on_milestone = on_milestone
        self._make_job = make_job
        self._entries: dict[str, Entry] = {}  # all unfinished ones
        self._waiting = WaitingQueue(limits.max_queue_wait_s)
        self._running: list[Entry] = []  # by rank
        self._suspects: list[Entry] = []
        self._in_flight: dict[int, Step] = {}  # by microbatch id
        self._step_began_at = 0.0  # that of the oldest step in flight
        self._num_arrivals = 0
        self._next_microbatch_id = 0
        self._failures: list[Event] = []
        self._num_traced = 0
        self.num_prompt_tokens = 0
        self.num_preemptions = 0
        self.num_prefix_tokens = 0
        self.num_prefix_tokens_reused = 0
        self.num_tokens_drafted = 0
        self.num_draft_tokens_accepted = 0
        self.num_rows_ahead = 0
        self.num_rows_ahead_wasted = 0
        self.num_not_finite = 0  # requests whose numbers went wrong

    @property
    def num_running(self) -> int:
        return sum(entry.job.width for entry in self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def waiting_request_ids(self) -> list[str]:
        """Of those that wait for their first turn, in the order of the queue."""
        return [entry.job.request.request_id for entry in self._waiting if not entry.was_preempted]

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_tokens_waiting(self) -> int:
        return sum(s.num_uncomputed for entry in self._entries.values() for s in entry.job.sequences)

    def queue_wait_s(self, priority: int = 0) -> float:
        """How long a request that came now would wait for its turn, judged by what waits before it."""
        return self._waiting.wait_s(self._rank_of_next(priority))

    def load(self) -> PipelineLoad:
        """What autoscaling judges by. Its speed is such that the backlog lasts as long as the queue's would."""
        work = self._work_left()
        num_tokens = work.prompt + work.new
        seconds = self._waiting.seconds_for(work)
        tokens_per_s = num_tokens / seconds if seconds > 0 else 0.0
        kv_share = self.blocks.num_used / self.blocks.num_blocks
        num_running = len(self._entries) - self.num_waiting
        return PipelineLoad(num_tokens, tokens_per_s, kv_share, self.num_waiting, num_running)

    @property
    def has_work(self) -> bool:
        return bool(self._entries)

    def add(self, request: EngineRequest, matcher: TokenMatcher | None = None) -> None:
        """Queue a request; `matcher` follows its grammar.

        Raises `InvalidRequestError` if it can't be finished here, `OverloadedError` if it would wait for too long.
        """
        if request.request_id in self._entries:
            raise InvalidRequestError("request_id", request.request_id, "is already being served")
        max_sequences = min(self.limits.max_num_sequences, self.limits.max_microbatch_tokens)
        check_fits(request, self.limits.max_sequence_tokens, max_sequences, self.blocks)
        now = self._clock()
        rank = self._rank_of_next(request.priority)
        self._waiting.check(request, rank)
        job = self._make_job(request, self.blocks.block_size, self._eos_token_ids, matcher, now)
        self._num_arrivals += 1
        entry = Entry(job, rank, now, job.work_left, now + self._patience_s(request))
        self._entries[request.request_id] = entry
        self._waiting.add(entry)
        self.num_prompt_tokens += request.num_prompt_tokens
        self._num_traced += bool(request.traceparent)
        self._on_milestone(Milestone.QUEUED, request, 0.0)

    def abort(self, request_id: str) -> bool:
        """Drop a request and release its blocks at once; False if it is not (or no longer) here."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        self._drop(entry)
        return True

    def schedule(self) -> MicroBatch | None:
        """The next microbatch, or None if nothing can be scheduled now."""
        feeding = self._feeding()
        if feeding is None:
            return None
        step = Step(self.limits.max_microbatch_tokens, self._prompt_budget(), feeding=feeding)
        if self._suspects:
            self._fill_with_suspect(step)
        else:
            self._fill(step)
        now = self._clock()
        self._waiting.on_scheduled(now)
        if not step.rows:
            return None
        if not self._in_flight:
            self._step_began_at = now
        microbatch = MicroBatch(self._next_microbatch_id, step.rows, step.copies, self._traceparents(step))
        self._in_flight[microbatch.microbatch_id] = step
        self._next_microbatch_id += 1
        return microbatch

    def _feeding(self) -> dict[Entry, Feed] | None:
        """What rows in flight can feed those of a microbatch made ahead with; None if it is better made later."""
        if not self.limits.schedules_ahead or not self._in_flight:
            return {}
        return feeds_of(self._in_flight[self._next_microbatch_id - 1])

    def _fill(self, step: Step) -> None:
        decoding = [entry for entry in self._running if entry.job.is_decoding or entry in step.feeding]
        has_prompts = len(decoding) < len(self._running)
        decode_cap = -(-sum(len(entry.job.sequences) for entry in decoding) // self.limits.num_stages)
        self._schedule_decoding(decoding, decode_cap, step)
        self._schedule_prompts(step, has_running=has_prompts)

    def _schedule_prompts(self, step: Step, *, has_running: bool) -> None:
        """Those of running jobs, if there are any, then of waiting ones."""
        if has_running:
            # Preemption takes entries off the end of the list that is gone through here: a list allows that.
            for entry in self._running:
                if not entry.job.is_decoding and not step.carries(entry):
                    self._schedule_prompt(entry, step)
        self._give_up_the_late()
        while min(step.budget, step.prompt_budget) > 0 and (admitted := self._admit_next()) is not None:
            self._schedule_prompt(admitted, step)

    def _prompt_budget(self) -> int:
        """Prompts that are few for the stages are cut into smaller chunks, so that all stages have some to work on."""
        num_chunks = CHUNKS_PER_STAGE * self.limits.num_stages
        if self.limits.num_stages == 1:
            return self.limits.max_microbatch_tokens
        num_tokens = self._num_prompt_tokens(num_chunks * self.limits.max_microbatch_tokens)
        return min(max(-(-num_tokens // num_chunks), MIN_CHUNK_TOKENS), self.limits.max_microbatch_tokens)

    def _num_prompt_tokens(self, enough: int) -> int:
        """Of those that don't decode: not computed yet, or in flight. No more are counted than are enough."""
        num_tokens = 0
        for entry in chain(self._running, self._waiting):
            if not entry.job.is_decoding:
                num_tokens += entry.work_left.prompt
                if num_tokens >= enough:
                    break
        return num_tokens

    def _fill_with_suspect(self, step: Step) -> None:
        """Rows of the first suspect and of nobody else, once nothing is in flight."""
        if self._in_flight:
            return
        entry = min(self._suspects, key=_rank)
        if not entry.is_running:
            if self._num_blocks_needed(entry.job) > self._num_blocks_to_give():
                for other in reversed(self._running.copy()):
                    self._preempt(other)
            self._waiting.remove(entry)
            self._start(entry)
        if entry.job.is_decoding:
            self._schedule_decoding([entry], len(entry.job.sequences), step)
        else:
            self._schedule_prompt(entry, step)

    def update(self, output: StepOutput) -> list[Event]:
        """Hand the oldest microbatch's results to the jobs that they are for, if these are still here."""
        assert output.microbatch_id == next(iter(self._in_flight)), "results out of order"
        step = self._in_flight.pop(output.microbatch_id)
        assert len(output.rows) == len(step.rows)
        events: list[Event] = []
        results = (result or _NOTHING for result in output.rows)
        now = self._clock()
        self._waiting.on_step(step.work, now - self._step_began_at)
        self._step_began_at = now
        for entry, rides in step.riders:
            own = list(islice(results, len(rides)))
            if self._entries.get(entry.job.request.request_id) is not entry:
                self.num_rows_ahead_wasted += sum(ride.row.fed_from is not None for ride in rides)
                for ride, result in zip(rides, own, strict=True):
                    if result.is_kv_suspect:  # the last block may have been published meanwhile
                        self.blocks.withdraw(ride.row.block_table)
                continue  # finished or aborted meanwhile
            taken = self._take(entry.job, rides, own, now)
            events += taken
            if taken:
                self._acquit(entry)
            has_ended = bool(taken) and is_terminal(taken[-1])
            before, entry.work_left = entry.work_left, NO_WORK if has_ended else entry.job.work_left
            self._waiting.on_done(before.minus(entry.work_left))
            if has_ended:
                self._drop(entry)
        return events

    def request_ids_in_flight(self) -> dict[int, list[str]]:
        """Whose rows each microbatch in flight has, by its id."""
        return {
            microbatch_id: [entry.job.request.request_id for entry, _ in step.riders]
            for microbatch_id, step in self._in_flight.items()
        }

    def reset(self) -> list[Event]:
        """After the loss of a stage: forget what is in flight and recompute every sequence (KV is gone).

        Returns the ends of requests that were under way in too many losses; another pipeline may take them further.
        """
        in_flight = {id(entry): entry for step in self._in_flight.values() for entry, _ in step.riders}
        self._in_flight.clear()
        self._waiting.on_loss()
        for entry in reversed(self._running.copy()):
            self._preempt(entry)
        self.blocks.withdraw_all()
        events: list[Event] = []
        for entry in in_flight.values():
            if self._entries.get(entry.job.request.request_id) is not entry:
                continue  # aborted meanwhile
            entry.num_losses += 1
            if entry.num_losses >= MAX_LOSSES:
                message = f"the pipeline was lost {entry.num_losses} times in a row while it computed this request"
                events.append(FailureEvent(entry.job.request.request_id, message, is_pipeline_at_fault=True))
                self._drop(entry)
            elif entry.num_losses == MAX_LOSSES_TOGETHER:
                self._suspects.append(entry)
        return events

    def take_failures(self) -> list[Event]:
        """The ends of requests whose jobs could not be scheduled; each is given once."""
        failures, self._failures = self._failures, []
        return failures

    def check_integrity(self) -> None:
        """Assert the invariants; tests call it after every scenario."""
        self.blocks.check_integrity([s.block_table for e in self._entries.values() for s in e.job.sequences])
        assert {id(e) for e in self._entries.values()} == {id(e) for e in [*self._waiting, *self._running]}
        assert all(not s.block_table and s.num_computed == 0 for e in self._waiting for s in e.job.sequences)
        assert all(e.is_running for e in self._running)
        assert not any(e.is_running for e in self._waiting)
        assert {id(e) for e in self._suspects} == {id(e) for e in self._entries.values() if e.is_suspect}
        assert [e.rank for e in self._running] == sorted(e.rank for e in self._running)
        assert [e.rank for e in self._waiting] == sorted(e.rank for e in self._waiting)

    def _work_left(self) -> Work:
        """As last counted."""
        work = NO_WORK
        for entry in self._entries.values():
            work = work.plus(entry.work_left)
        return work

    def _schedule_decoding(self, entries: list[Entry], max_rows: int, step: Step) -> None:
        """One token of each sequence of these jobs; then, as far as there is room, drafts to go with them."""
        booked: list[Entry] = []
        num_rows = 0
        for entry in entries:
            if num_rows >= max_rows:
                break
            if self._book(entry, step):
                booked.append(entry)
                num_rows += len(entry.job.sequences)
        # Half of what is left is for prompts, if there are any: a draft is only a guess.
        has_prompts = bool(self._waiting) or len(entries) < len(self._running)
        max_draft = step.budget // (1 + has_prompts) // max(1, len(booked))
        for entry in booked:
            draft = self._draft(entry.job, max_draft)
            step.budget -= len(draft)
            for sequence in entry.job.sequences:
                self._board(entry, sequence, 1, draft, step)

    def _book(self, entry: Entry, step: Step) -> bool:
        """Budget and blocks for one token of each of the job's sequences, or nothing: they belong together."""
        sequences = entry.job.sequences
        if not entry.is_running or len(sequences) > step.budget:
            return False
        writes = []
        for sequence in sequences:
            if sequence.num_uncomputed != 1 and not is_fed(entry, step):
                return False
            writes.append((sequence.block_table, sequence.num_computed, sequence.num_computed + 1))
        num_missing = self.blocks.num_missing
        missing = num_missing(*writes[0]) if len(writes) == 1 else self.blocks.num_missing_together(writes)
        if not self._make_room(entry, missing, step):
            return False
        for write in writes:
            step.copies += self.blocks.prepare(*write)
        step.budget -= len(sequences)
        step.booked.add(entry)
        return True

    def _draft(self, job: Job, max_tokens: int) -> list[int]:
        """A draft that takes no block that anyone else will need soon."""
        if len(job.sequences) > 1 or max_tokens <= 0:
            return []
        draft = job.draft(max_tokens)
        while draft and self._num_missing(job.sequences[0], 1 + len(draft)) > max(0, self._num_blocks_to_give()):
            draft.pop()
        return draft

    def _schedule_prompt(self, entry: Entry, step: Step) -> None:
        """As much of the job's sequences as the budget allows. Of several, the last token waits for the others'."""
        for sequence in entry.job.sequences:
            reused = sequence.reuse(self.blocks, entry.job.num_reusable(sequence))
            self.num_prefix_tokens_reused += reused
            num_left = sequence.num_uncomputed - (len(entry.job.sequences) > 1)
            num_tokens = min(num_left, step.budget, step.prompt_budget)
            if num_tokens > 0:
                if not self._make_room(entry, self._num_missing(sequence, num_tokens), step):
                    return
                step.budget -= num_tokens
                step.prompt_budget -= num_tokens
                self._board(entry, sequence, num_tokens, [], step)
        if len(entry.job.sequences) > 1 and not step.carries(entry):
            self._schedule_decoding([entry], len(entry.job.sequences), step)  # others had computed all of it

    def _num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        start = sequence.num_computed
        return self.blocks.num_missing(sequence.block_table, start, start + num_tokens)

    def _make_room(self, entry: Entry, num_blocks: int, step: Step) -> bool:
        """Preempt from the end until so many blocks are free; False if that would take the job itself or a rider."""
        while self.blocks.num_free < num_blocks:
            victim = self._running[-1]
            if step.carries(victim):
                return False  # the next microbatch may preempt it
            self._preempt(victim)
            if victim is entry:
                return False
        return True

    def _board(self, entry: Entry, sequence: Sequence, num_tokens: int, draft: list[int], step: Step) -> None:
        if entry.job.request.request_id not in self._entries:
            return  # its first row failed
        start, end = sequence.num_computed, sequence.num_computed + num_tokens
        if len(sequence.block_table) * self.blocks.block_size < end + len(draft):  # else it is booked
            step.copies += self.blocks.prepare(sequence.block_table, start, end + len(draft))
        try:
            row = fed_row(entry, step) if is_fed(entry, step) else entry.job.row(sequence, end, draft)
        except Exception:
            _log_failure(logging.ERROR, entry.job, "could not be scheduled", exc_info=True)
            step.remove(entry)
            self._drop(entry)
            self._failures.append(FailureEvent(entry.job.request.request_id, INTERNAL_ERROR))
            return
        sequence.num_computed = end
        sequence.publish(self.blocks, end)
        step.add(entry, Ride(sequence, row, sequence.num_evictions))
        self.num_tokens_drafted += len(draft)
        self.num_rows_ahead += row.fed_from is not None

    def _admit_next(self) -> Entry | None:
        """Move the first waiting job to running if the blocks for all its tokens are free, and some to spare."""
        entry = self._waiting.first
        if entry is None:
            return None
        if self.num_running + entry.job.width > self.limits.max_num_sequences:
            return None
        if self._num_blocks_needed(entry.job) > self._num_blocks_to_give():
            return None
        self._waiting.remove(entry)
        self._start(entry)
        return entry

    def _rank_of_next(self, priority: int) -> tuple[int, int]:
        return (self._num_arrivals + priority * PRIORITY_STEP, self._num_arrivals)

    def _patience_s(self, request: EngineRequest) -> float:
        """How long it may wait for its first turn."""
        if request.is_admitted:
            return math.inf
        return min(self.limits.max_queue_wait_s, math.inf if request.time_left_s is None else request.time_left_s)

    def _give_up_the_late(self) -> None:
        now = self._clock()
        retry_after_s = 0.0
        for entry in self._waiting.remove_late(now):
            retry_after_s = retry_after_s or self.queue_wait_s()
            self._forget(entry)
            waited_s = now - entry.waits_since
            message = f"it was not the request's turn yet when its time to wait was over, after {waited_s:.1f} s"
            self._failures.append(FailureEvent(entry.job.request.request_id, message, retry_after_s=retry_after_s))

    def _start(self, entry: Entry) -> None:
        entry.is_running = True
        insort(self._running, entry, key=_rank)
        milestone = Milestone.RESUMED if entry.was_preempted else Milestone.SCHEDULED
        self._on_milestone(milestone, entry.job.request, self._clock() - entry.waits_since)
        for sequence in entry.job.sequences:
            reusable = entry.job.num_reusable(sequence) // self.blocks.block_size
            self.num_prefix_tokens += reusable * self.blocks.block_size

    def _num_blocks_needed(self, job: Job) -> int:
        if len(job.sequences) > 1:
            lengths = [len(sequence.token_ids) for sequence in job.sequences]
            return max_blocks(job.request, lengths, self.blocks)
        (sequence,) = job.sequences
        keys = sequence.prefix_keys(self.blocks, job.num_reusable(sequence))
        return self.blocks.blocks_for(len(sequence.token_ids)) - self.blocks.num_shareable(keys)

    def _num_blocks_to_give(self) -> int:
        """Free blocks, less those that running prompts have yet to take, less one for each running sequence to grow."""
        reserved = sum(
            max(0, self.blocks.blocks_for(len(s.token_ids)) - len(s.block_table))
            for entry in self._running
            for s in entry.job.sequences
            if s.num_uncomputed
        )
        return self.blocks.num_free - reserved - self.num_running

    def _take(self, job: Job, rides: list[Ride], results: list[RowResult], now: float) -> list[Event]:
        failed = next((result for result in results if result.failure is not None), None)
        if failed is not None and failed.failure is not None:
            if failed.is_kv_suspect:
                self.num_not_finite += 1
                self.blocks.withdraw(block for sequence in job.sequences for block in sequence.block_table)
            level = logging.WARNING if failed.is_kv_suspect else logging.INFO  # else its own constraints did it
            _log_failure(level, job, f"failed on the last stage: {failed.failure}")
            return [FailureEvent(job.request.request_id, failed.failure, not failed.is_kv_suspect)]
        try:
            events = job.take(rides, results, self.blocks, now)
        except Exception:
            _log_failure(logging.ERROR, job, "got results that could not be used", exc_info=True)
            return [FailureEvent(job.request.request_id, INTERNAL_ERROR)]
        if len(events) > 1:
            self.num_draft_tokens_accepted += max(0, sum(isinstance(event, TokenEvent) for event in events) - 1)
        return events

    def _preempt(self, entry: Entry) -> None:
        self._running.remove(entry)
        entry.is_running = False
        for sequence in entry.job.sequences:
            sequence.evict(self.blocks)
        entry.work_left = entry.job.work_left
        entry.waits_since = self._clock()
        entry.was_preempted = True
        self._waiting.add(entry)
        self.num_preemptions += 1
        request = entry.job.request
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("request %s is preempted, to be computed again", request.request_id, extra=_of(request))
        self._on_milestone(Milestone.PREEMPTED, request, 0.0)

    def _acquit(self, entry: Entry) -> None:
        if entry.is_suspect:
            self._suspects.remove(entry)
        entry.num_losses = 0

    def _drop(self, entry: Entry) -> None:
        (self._running if entry.is_running else self._waiting).remove(entry)
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        self._acquit(entry)
        entry.is_running = False
        del self._entries[entry.job.request.request_id]
        for sequence in entry.job.sequences:
            self.blocks.release(sequence.block_table)
        self._num_traced -= bool(entry.job.request.traceparent)

    def _traceparents(self, step: Step) -> list[str]:
        if not self._num_traced:
            return []
        return [traceparent for entry, _ in step.riders if (traceparent := entry.job.request.traceparent)]


_NOTHING = RowResult()

INTERNAL_ERROR = "an internal error; the service's log has more"
"""One job's own. It must not take the others down with it."""


def _rank(entry: Entry) -> tuple[int, int]:
    return entry.rank


def _of(request: EngineRequest) -> dict[str, str]:
    """For structured logs: which request a line is about."""
    return {"request_id": request.request_id}


def _log_failure(level: int, job: Job, what: str, *, exc_info: bool = False) -> None:
    logger.log(level, "request %s %s", job.request.request_id, what, exc_info=exc_info, extra=_of(job.request))
