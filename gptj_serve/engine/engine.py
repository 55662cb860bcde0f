"""The engine loop: schedule, run, update.

It keeps up to `num_stages` microbatches in flight, so that every stage has one to work on, or two if a single stage is
scheduled ahead. It holds no tensors and knows a pipeline only through the `Pipeline` protocol; requests come in through
`add` and `abort`, and each step's events go out together through one callback.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from gptj_serve.engine.logit_editor import TokenMatcher
from gptj_serve.engine.rate import Rate
from gptj_serve.engine.scheduler import Scheduler
from gptj_serve.errors import PipelineError
from gptj_serve.scaling.policy import PipelineLoad
from gptj_serve.steps import MicroBatch, StepOutput
from gptj_serve.types import EngineRequest, EngineStats, Event, FailureEvent, is_terminal, num_generated

logger = logging.getLogger(__name__)

MAX_FUTILE_RECOVERIES = 8
"""After so many losses in a row that took a step with them, without a finished one, the pipeline is taken for broken,
and this engine stops.

By then the scheduler has given up several requests that might have been the cause. Losses while nothing was in flight
say nothing of the sort, however many there are.
"""

SOON_S = 10.0
"""A stage that is lost while idle, so soon after the pipeline came back, may be lost again at once: then the next
attempt waits."""

MAX_RECOVERY_ATTEMPTS = 4
RECOVERY_DELAY_S = 0.25
MAX_RECOVERY_DELAY_S = 4.0
"""Before the second attempt in a row to bring the pipeline back; doubled before each later one. After a loss while idle
too, but only if it follows the last recovery soon."""


class Pipeline(Protocol):
    """The one seam between engine and stages."""

    async def run(self, microbatch: MicroBatch) -> StepOutput:
        """Run one microbatch through all stages. Raises `PipelineError` when a stage is lost."""

    async def watch(self) -> None:
        """Raise `PipelineError` as soon as a stage is lost, also while no step runs; else never return."""

    async def recover(self) -> None:
        """After a `PipelineError`: make all stages ready for a fresh start, or raise it again."""

    def stage_statuses(self) -> list[dict[str, Any]]:
        """What each stage is and does, as `api.status.StageStatus`; from what is known, without waiting."""


class Engine:
    """Serves requests over a pipeline. `emit` is called once per step with that step's events, in the loop's task.

    `run` must be started in a task that belongs to no request: a task born inside a request dies with it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        emit: Callable[[list[Event]], None],
        on_ready_change: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """`on_ready_change` is told when the pipeline is lost (False) and when it is back (True)."""
        self._on_ready_change = on_ready_change
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._emit = emit
        self._steps: deque[asyncio.Task[StepOutput]] = deque()  # in flight, oldest first
        self._watch: asyncio.Task[None] | None = None
        self._work_arrived = asyncio.Event()
        self._num_futile_recoveries = 0  # in a row, each with a step lost
        self._num_idle_losses = 0  # in a row, each soon after the one before
        self._recovered_at = -math.inf
        self._num_recoveries = 0
        self._is_recovering = False
        self._token_rate = Rate()
        self._num_tokens_generated = 0
        self._num_finished = 0
        self._num_aborted = 0
        self._num_failed = 0

    def add(self, request: EngineRequest, matcher: TokenMatcher | None = None) -> None:
        """Queue a request; `matcher` follows its grammar.

        Raises `InvalidRequestError` if it can't be finished here, `OverloadedError` if it would wait for too long.
        """
        self._scheduler.add(request, matcher)
        self._work_arrived.set()

    def abort(self, request_id: str) -> None:
        """Forget a request and free its KV blocks at once; nothing happens if it has ended already."""
        self._num_aborted += self._scheduler.abort(request_id)

    @property
    def is_ready(self) -> bool:
        return not self._is_recovering

    def status(self) -> dict[str, Any]:
        """As `api.status.PipelineStatus`, but for the replica's id."""
        return {
            "is_ready": self.is_ready,
            "now": time.time(),
            "tokens_per_s": self._token_rate.per_second(),
            "stages": self._pipeline.stage_statuses(),
            "engine": self.stats().as_dict(),
        }

    def queue_wait_s(self) -> float:
        """How long a request of priority 0 that came now would wait for its turn."""
        return self._scheduler.queue_wait_s()

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    def waiting_request_ids(self) -> list[str]:
        """Of those that nothing was computed for yet, in the order of the queue."""
        return self._scheduler.waiting_request_ids()

    def load(self) -> PipelineLoad:
        """What autoscaling judges by."""
        return self._scheduler.load()

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_microbatches_in_flight=scheduler.num_in_flight,
            num_kv_blocks=scheduler.blocks.num_blocks,
            num_kv_blocks_used=scheduler.blocks.num_used,
            num_tokens_waiting=scheduler.num_tokens_waiting,
            queue_wait_s=scheduler.queue_wait_s(),
            num_preemptions=scheduler.num_preemptions,
            num_prefix_tokens=scheduler.num_prefix_tokens,
            num_prefix_tokens_reused=scheduler.num_prefix_tokens_reused,
            num_tokens_drafted=scheduler.num_tokens_drafted,
            num_draft_tokens_accepted=scheduler.num_draft_tokens_accepted,
            num_rows_ahead=scheduler.num_rows_ahead,
            num_rows_ahead_wasted=scheduler.num_rows_ahead_wasted,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_tokens_generated=self._num_tokens_generated,
            num_requests_finished=self._num_finished,
            num_requests_aborted=self._num_aborted,
            num_requests_failed=self._num_failed,
            num_requests_not_finite=scheduler.num_not_finite,
            num_recoveries=self._num_recoveries,
        )

    async def run(self) -> None:
        """Serve until cancelled. Raises `PipelineError` when the pipeline can't be recovered.

        What is unfinished then has no terminal event: whoever runs this knows whether it can go on elsewhere.
        """
        self._watch = asyncio.create_task(self._pipeline.watch())
        try:
            while True:
                self._fill_pipeline()
                try:
                    await self._wait_for_step_or_work()
                except PipelineError as error:
                    await self._recover(error)
        finally:
            self._cancel_steps()
            self._watch.cancel()

    def _fill_pipeline(self) -> None:
        while len(self._steps) < self._scheduler.limits.max_in_flight:
            microbatch = self._scheduler.schedule()
            failures = self._scheduler.take_failures()
            self._publish(failures)
            if microbatch is None:
                if failures:
                    continue  # what they held back may be schedulable now
                break
            self._steps.append(asyncio.create_task(self._pipeline.run(microbatch)))
        if self._scheduler.has_work and not self._steps:
            raise RuntimeError("unfinished sequences, nothing in flight and nothing schedulable: a scheduler bug")

    async def _wait_for_step_or_work(self) -> None:
        assert self._watch is not None
        work_arrived = asyncio.create_task(self._work_arrived.wait())
        try:
            await asyncio.wait({*self._steps, work_arrived, self._watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work_arrived.cancel()
        self._work_arrived.clear()
        for task in (*self._steps, self._watch):
            if task.done() and (error := task.exception()) is not None:
                raise error
        while self._steps and self._steps[0].done():
            self._publish(self._scheduler.update(self._steps.popleft().result()))
            self._num_futile_recoveries = self._num_idle_losses = 0

    async def _recover(self, error: PipelineError) -> None:
        assert self._watch is not None
        request_ids_in_flight = self._scheduler.request_ids_in_flight()
        in_flight = "; ".join(
            f"microbatch {microbatch_id} of {', '.join(request_ids)}"
            for microbatch_id, request_ids in request_ids_in_flight.items()
        )
        logger.warning(
            "a stage or a link was lost, recomputing all sequences once it is back: %s [in flight: %s]",
            error,
            in_flight,
        )
        self._set_recovering(True)
        self._cancel_steps()
        self._watch.cancel()
        self._publish(self._scheduler.reset())
        self._num_recoveries += 1
        if request_ids_in_flight:
            self._num_futile_recoveries += 1
            if self._num_futile_recoveries > MAX_FUTILE_RECOVERIES:
                raise PipelineError(f"lost {self._num_futile_recoveries} times without a finished step: {error}")
            delay_s = _delay_s(self._num_futile_recoveries - 1)
        else:
            follows_soon = time.monotonic() - self._recovered_at < SOON_S
            self._num_idle_losses = self._num_idle_losses + 1 if follows_soon else 0
            delay_s = _delay_s(self._num_idle_losses)
        await asyncio.sleep(delay_s)
        lost_at = time.monotonic()
        await self._bring_back()
        logger.info("the pipeline is whole again after %.1f s", time.monotonic() - lost_at)
        self._recovered_at = time.monotonic()
        self._watch = asyncio.create_task(self._pipeline.watch())
        self._set_recovering(False)

    def _set_recovering(self, is_recovering: bool) -> None:
        self._is_recovering = is_recovering
        self._on_ready_change(not is_recovering)

    async def _bring_back(self) -> None:
        for attempt in range(1, MAX_RECOVERY_ATTEMPTS):
            try:
                return await self._pipeline.recover()
            except PipelineError as again:
                logger.warning("the pipeline did not come back: %s", again)
                await asyncio.sleep(_delay_s(attempt))
        return await self._pipeline.recover()

    def _publish(self, events: list[Event]) -> None:
        num_tokens = sum(map(num_generated, events))
        if num_tokens:
            self._num_tokens_generated += num_tokens
            self._token_rate.add(num_tokens)
        for event in events:
            self._num_failed += isinstance(event, FailureEvent)
            self._num_finished += is_terminal(event) and not isinstance(event, FailureEvent)
        if events:
            self._emit(events)

    def _cancel_steps(self) -> None:
        for step in self._steps:
            step.cancel()
        self._steps.clear()


def _delay_s(num_failures: int) -> float:
    return min(RECOVERY_DELAY_S * 2 ** (num_failures - 1), MAX_RECOVERY_DELAY_S) if num_failures else 0.0
