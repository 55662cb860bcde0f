"""`SteadyRows`: the real scheduler, spared the rows that only go on.

Most rows of most steps decode: they get a token, and now and then a KV block, as in the step before. These are kept in
cohorts, which advance by a few additions. Everything else is the scheduler's own code at work on its own state:
arrivals, refusals, admission, prompts, ends. As soon as it might look at a decoding sequence by itself, because there
are too few KV blocks, all cohorts are dissolved: their sequences are what they would have been, and the scheduler goes
on with all of them. `tests/simulation` hold this against `EveryRow`: the results are equal, to the last bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from gptj_serve.engine.backlog import NO_WORK, Work
from gptj_serve.engine.job import Ride
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.engine.step import Entry, Step
from gptj_serve.simulation.cohort import Cohort, job_of
from gptj_serve.simulation.outcomes import Outcomes
from gptj_serve.simulation.simulated_job import make_simulated_job
from gptj_serve.simulation.step_shape import StepShape, shape_of
from gptj_serve.simulation.steps_source import note_events
from gptj_serve.steps import StepOutput
from gptj_serve.types import EngineRequest


@dataclass(slots=True)
class _Step(Step):
    cohort: Cohort | None = field(default=None)


class SteadyRows(Scheduler):
    """For requests made by `simulated_request`. Those in cohorts are not in `_running`."""

    def __init__(
        self, limits: SchedulerLimits, blocks: KVBlocks, outcomes: Outcomes, clock: Callable[[], float]
    ) -> None:
        super().__init__(limits, blocks, frozenset(), clock, make_job=make_simulated_job)
        self._outcomes = outcomes
        self._ready: list[Cohort] = []  # not in flight, and each with its last tokens of one time
        self._num_steady = 0  # in all cohorts

    # ── a step ───────────────────────────────────────────────────────────────────────────────────────────

    def next_step(self) -> StepShape | None:
        """As `schedule`."""
        step = _Step(self.limits.max_microbatch_tokens, self._prompt_budget())
        self._fill(step)
        now = self._clock()
        self._waiting.on_scheduled(now)
        cohort = step.cohort
        if cohort is None and not step.rows:
            return None
        if not self._in_flight:
            self._step_began_at = now
        self._in_flight[self._next_microbatch_id] = step
        self._next_microbatch_id += 1
        if cohort is None:
            return shape_of(step.rows)
        num_rows = cohort.num_rows
        if not step.rows:
            return cohort.shape
        others = shape_of(step.rows)
        return StepShape(
            num_rows + others.num_rows,
            num_rows + others.num_tokens,
            cohort.num_tokens + others.num_context_tokens,
            cohort.num_tokens + others.num_pairs,
            num_rows + others.num_samples,
        )

    def complete(self) -> None:
        """As `update`."""
        microbatch_id, step = next(iter(self._in_flight.items()))
        assert isinstance(step, _Step)
        now = self._clock()
        cohort = step.cohort
        if cohort is not None:
            num_rows = cohort.num_rows
            for last_s, count in cohort.parts:
                self._outcomes.on_gaps(now - last_s, count)
            ended = cohort.step(now)
            self._waiting.on_done(Work(len(ended), num_rows))
            for entry in ended:
                self._end(cohort, entry, now)
        note_events(self._outcomes, now, self.update(StepOutput(microbatch_id, [None] * len(step.rows))))
        if step.riders:
            cohort = self._gather(step, cohort, now)
        if cohort is not None and cohort.num_rows:
            self._ready.append(cohort)

    def repeat(self) -> StepShape | None:
        """`complete`, and if all that follows is the same rows once more, that as `next_step`; else nothing is done.

        It is what nearly all steps are: nobody waits or has a prompt to be computed, and none of the rows has ended.
        Then nothing is saturated either, and the queue's rate of work does not change.
        """
        microbatch_id, step = next(iter(self._in_flight.items()))
        cohort: Cohort | None = step.cohort  # type: ignore[attr-defined]
        if cohort is None or step.rows or self._running or self._ready or len(self._waiting):
            return None
        num_rows = cohort.num_rows
        is_too_large = num_rows * self.limits.num_stages >= self._num_steady + self.limits.num_stages
        if is_too_large or cohort.ends[0][0] == cohort.num_steps + 1:
            return None
        growing = cohort.phases[-cohort.num_steps % cohort.block_size]  # after the step that is complete now
        if len(growing) > self.blocks.num_free:
            return None
        now = self._clock()
        outcomes = self._outcomes
        for last_s, count in cohort.parts:
            outcomes.on_gaps(now - last_s, count)
        cohort.advance(now)
        self._waiting.on_step(step.work, now - self._step_began_at)
        self._step_began_at = now
        if growing:
            self._grow(cohort, growing)
        del self._in_flight[microbatch_id]
        self._in_flight[self._next_microbatch_id] = step
        self._next_microbatch_id += 1
        return cohort.shape

    def refuse_late(self) -> bool:
        failures = self.take_failures()
        note_events(self._outcomes, self._clock(), failures)
        return bool(failures)

    def give_away(self, num_parts: int) -> list[EngineRequest]:
        """Of those who have not begun the last ones, one in so many; they go elsewhere."""
        waiting = [entry.job.request for entry in self._waiting if not entry.was_preempted]
        given = waiting[len(waiting) - len(waiting) // num_parts :]
        for request in given:
            self.abort(request.request_id)
        return [msgspec.structs.replace(request, is_admitted=True) for request in given]

    def _end(self, cohort: Cohort, entry: Entry, now: float) -> None:
        cohort.write_back(entry, 0)
        job = job_of(entry)
        job.sequence.publish(self.blocks, job.sequence.num_computed)
        self._num_steady -= 1
        self._forget(entry)
        index = int(job.request.request_id)
        self._outcomes.last_s[index] = now
        self._outcomes.on_end(index, job.num_output)

    # ── what the scheduler asks itself ───────────────────────────────────────────────────────────────────

    @property
    def num_running(self) -> int:
        return len(self._running) + self._num_steady

    @property
    def num_ongoing(self) -> int:
        return len(self._entries)

    def _work_left(self) -> Work:
        work = NO_WORK
        for entry in (*self._running, *self._waiting):
            work = work.plus(entry.work_left)
        for cohort in (*self._ready, *self._cohorts_in_flight()):
            work = work.plus(Work(cohort.num_rows, cohort.num_left))
        return work

    def _num_blocks_to_give(self) -> int:
        return super()._num_blocks_to_give() - sum(len(cohort.in_need_of_a_block()) for cohort in self._ready)

    def _fill(self, step: Step) -> None:
        assert isinstance(step, _Step)
        num_decoding = self._num_steady
        num_reserved = 0
        for entry in self._running.copy():
            if entry.job.is_decoding:
                num_decoding += 1
                if entry.job.sequences[0].num_uncomputed:
                    if self._is_in_flight(entry):
                        self._dissolve()
                        return super()._fill(step)
                    self._settle(entry)
            else:
                sequence = entry.job.sequences[0]
                num_reserved += self.blocks.blocks_for(len(sequence.token_ids)) - len(sequence.block_table)
        num_growing = sum(len(cohort.in_need_of_a_block()) for cohort in self._ready)
        if num_growing + num_reserved > self.blocks.num_free:
            self._dissolve()
            return super()._fill(step)
        if self._ready:
            self._board_cohort(step, min(-(-num_decoding // self.limits.num_stages), step.budget))
        self._schedule_prompts(step, has_running=bool(self._running))
        return None

    def _preempt(self, entry: Entry) -> None:
        assert not self._num_steady, "a sequence was to be preempted while others are in cohorts"
        super()._preempt(entry)

    # ── cohorts ──────────────────────────────────────────────────────────────────────────────────────────

    def _board_cohort(self, step: _Step, max_rows: int) -> None:
        """The first so many in rank of those that are ready, with the blocks that they need."""
        if sum(cohort.num_rows for cohort in self._ready) > max_rows:
            cohort, self._ready = self._split(max_rows)
        else:
            cohort = max(self._ready, key=lambda cohort: cohort.num_rows)
            for other in self._ready:
                if other is not cohort:
                    cohort.absorb(other)
            self._ready = []
        self._grow(cohort, cohort.in_need_of_a_block())
        step.cohort = cohort
        step.budget -= cohort.num_rows
        step.work = Work(0, cohort.num_rows)

    def _grow(self, cohort: Cohort, growing: list[Entry]) -> None:
        if len(growing) > 1:
            growing = sorted(growing, key=_rank)
        blocks = self.blocks
        for entry in growing:
            job = job_of(entry)
            num_tokens = job.base + cohort.num_steps
            job.sequence.publish(blocks, num_tokens - 1)
            blocks.prepare(job.sequence.block_table, num_tokens - 1, num_tokens)

    def _split(self, num_rows: int) -> tuple[Cohort, list[Cohort]]:
        """The first so many in rank of those that are ready, and cohorts of the others."""
        block_size = self.blocks.block_size
        ranked = sorted(
            (entry.rank, number, num_left, entry)
            for number, cohort in enumerate(self._ready)
            for entry, num_left in cohort
        )
        first, others = Cohort(block_size), [Cohort(block_size) for _ in self._ready]
        for place, (_, number, num_left, entry) in enumerate(ranked):
            target = first if place < num_rows else others[number]
            source = self._ready[number]
            target.join(entry, job_of(entry).base + source.num_steps, num_left, source.last_token_s(entry))
        for before, after in zip(self._ready, others, strict=True):
            ((last_s, count),) = before.parts
            after.parts = [(last_s, after.num_rows)]
            first.parts.append((last_s, count - after.num_rows))
        return first, [cohort for cohort in others if cohort.num_rows]

    def _gather(self, step: Step, cohort: Cohort | None, now: float) -> Cohort | None:
        """Those who decode from now on join the cohort they came with, or found one."""
        for entry, _ in step.riders:
            job = job_of(entry)
            request_id = job.request.request_id
            if not entry.is_running or self._entries.get(request_id) is not entry or not self._is_steady(entry):
                continue
            if self._outcomes.last_s[int(request_id)] != now:  # computed again up to its last token
                self._settle(entry)
                continue
            cohort = cohort or Cohort(self.blocks.block_size)
            self._running.remove(entry)
            cohort.join(entry, len(job.sequence.token_ids), job.num_left, now)
            self._num_steady += 1
        if cohort is not None:
            cohort.parts = [(now, cohort.num_rows)]
        return cohort

    def _settle(self, entry: Entry) -> None:
        """Into a cohort of its own: it has waited, so its last token is older than the others'."""
        job, cohort = job_of(entry), Cohort(self.blocks.block_size)
        self._running.remove(entry)
        last_s = self._outcomes.last_s[int(job.request.request_id)]
        cohort.join(entry, len(job.sequence.token_ids), job.num_left, last_s)
        cohort.parts = [(last_s, 1)]
        self._ready.append(cohort)
        self._num_steady += 1

    def _is_steady(self, entry: Entry) -> bool:
        return entry.job.is_decoding and entry.job.sequences[0].num_uncomputed == 1 and not self._is_in_flight(entry)

    def _is_in_flight(self, entry: Entry) -> bool:
        """Only what was preempted, and so comes in chunks again, is computed further before all of it is back."""
        return entry.was_preempted and any(
            rider is entry for step in self._in_flight.values() for rider, _ in step.riders
        )

    def _cohorts_in_flight(self) -> list[Cohort]:
        return [step.cohort for step in self._in_flight.values() if isinstance(step, _Step) and step.cohort is not None]

    def _dissolve(self) -> None:
        """Back to one by one, in flight too."""
        for cohort in self._ready:
            self._release(cohort)
        self._ready = []
        for step in self._in_flight.values():
            assert isinstance(step, _Step)
            if step.cohort is not None:
                entries = sorted(self._release(step.cohort), key=_rank)
                own = [self._ride(entry) for entry in entries]
                step.rows = [*(ride.row for ride in own), *step.rows]
                step.riders = [*((entry, [ride]) for entry, ride in zip(entries, own, strict=True)), *step.riders]
                step.booked.update(entries)
                step.cohort = None
        self._num_steady = 0
        self._running.sort(key=_rank)

    def _release(self, cohort: Cohort) -> list[Entry]:
        """To `_running`, with the last token not computed yet."""
        entries = []
        for entry, num_left in cohort:
            cohort.write_back(entry, num_left)
            job = job_of(entry)
            job.sequence.publish(self.blocks, job.sequence.num_computed)
            entry.work_left = job.work_left
            self._outcomes.last_s[int(job.request.request_id)] = cohort.last_token_s(entry)
            entries.append(entry)
        self._running += entries
        return entries

    def _ride(self, entry: Entry) -> Ride:
        sequence = entry.job.sequences[0]
        end = sequence.num_computed + 1
        ride = Ride(sequence, entry.job.row(sequence, end, []), sequence.num_evictions)
        sequence.num_computed = end
        sequence.publish(self.blocks, end)
        return ride


def _rank(entry: Entry) -> tuple[int, int]:
    return entry.rank
