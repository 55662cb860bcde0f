"""What a profile keeps of one engine: a scheduler and meters that remember all they do, in one `Timeline`.

They stand in for the ordinary ones while a profile is taken, so a service pays nothing for them.
"""

import time
from collections.abc import Callable

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.milestones import Milestone
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.engine.timeline import Occupancy, Passage, SchedulerSpan, Span, Timeline
from gptj_serve.pipeline.step_meter import Step, StepMeter
from gptj_serve.steps import MicroBatch, StepOutput
from gptj_serve.types import EngineRequest, Event


class RecordingMeter(StepMeter):
    """Keeps all steps. The stage's thread adds to them."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        super().__init__(clock)
        self.recorded: list[Step] = []

    def end(self, microbatch: MicroBatch) -> None:
        super().end(microbatch)
        self.recorded.append(self._steps[-1])


class RecordingScheduler(Scheduler):
    """Keeps when it was at work and what it held, by the same clock as the meters (`Step` has Unix time)."""

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: KVBlocks,
        eos_token_ids: frozenset[int],
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(limits, blocks, eos_token_ids, on_milestone=self._on_passage)
        self._unix_clock = unix_clock
        self._timeline = Timeline(limits.num_stages)
        self._shares: dict[int, tuple[int, int]] = {}  # by microbatch id: decode rows, prompt tokens

    def begin(self) -> None:
        """Forget what was recorded so far."""
        self._timeline = Timeline(self.limits.num_stages)
        self._shares = {}

    def timeline(self, meters: list[RecordingMeter]) -> Timeline:
        """Since `begin`; the steps are those of the microbatches that were scheduled since."""
        self._timeline.spans = [
            Span(
                step.microbatch_id,
                stage_index,
                step.started_at,
                step.ended_at,
                step.num_rows,
                step.num_tokens,
                *self._shares[step.microbatch_id],
                handoff_s=step.handoff_s,
            )
            for stage_index, meter in enumerate(meters)
            for step in meter.recorded
            if step.microbatch_id in self._shares
        ]
        return self._timeline

    def schedule(self) -> MicroBatch | None:
        began_at, num_drafted = self._unix_clock(), self.num_tokens_drafted
        microbatch = super().schedule()
        microbatch_id = None if microbatch is None else microbatch.microbatch_id
        self._timeline.scheduler_spans.append(SchedulerSpan("schedule", microbatch_id, began_at, self._unix_clock()))
        if microbatch is not None:
            work = self._in_flight[microbatch.microbatch_id].work  # counts drafted tokens with those of prompts
            num_prompt_tokens = work.prompt - (self.num_tokens_drafted - num_drafted)
            self._shares[microbatch.microbatch_id] = (work.new, num_prompt_tokens)
            self._take_stock()
        return microbatch

    def update(self, output: StepOutput) -> list[Event]:
        began_at = self._unix_clock()
        events = super().update(output)
        self._timeline.scheduler_spans.append(
            SchedulerSpan("update", output.microbatch_id, began_at, self._unix_clock())
        )
        self._take_stock()
        return events

    def _take_stock(self) -> None:
        occupancy = Occupancy(self._unix_clock(), self.num_waiting, self.num_running, self.blocks.num_used)
        self._timeline.occupancies.append(occupancy)

    def _on_passage(self, milestone: Milestone, request: EngineRequest, elapsed_s: float) -> None:
        passage = Passage(self._unix_clock(), milestone, request.request_id, elapsed_s)
        self._timeline.passages.append(passage)
