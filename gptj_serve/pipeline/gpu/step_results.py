"""`StepResults`: the thread of a stage's process that waits for its device's steps, and sends what comes of them."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from gptj_serve.pipeline.gpu.gpu_runner import GPUStageRunner
from gptj_serve.pipeline.gpu.gpu_step import GPUStep
from gptj_serve.pipeline.step_meter import StepMeter
from gptj_serve.steps import MicroBatch, StepOutput


class GivenStep(NamedTuple):
    step: GPUStep
    microbatch: MicroBatch
    given_at: float  # Unix time
    sent_at: float | None  # by the stage before


class StepResults:
    """While it waits, the stage's own thread gives the device the next step."""

    def __init__(
        self,
        runner: GPUStageRunner,
        meter: StepMeter,
        send: Callable[[StepOutput], None],
        fail: Callable[[Exception], None],
    ) -> None:
        """`send` and `fail` are called in the thread: the one for each of the last stage's steps, the other once."""
        self._runner = runner
        self._meter = meter
        self._send = send
        self._fail = fail
        self._steps: SimpleQueue[GivenStep | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="stage-results", daemon=True)
        self._thread.start()

    def put(self, step: GivenStep) -> None:
        self._steps.put(step)

    def close(self) -> None:
        """Returns when all steps are done, or one has failed."""
        self._steps.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (given := self._steps.get()) is not None:
                if given.step.hidden is None:
                    self._send(self._runner.output(given.step))
                else:
                    given.step.wait()
                self._meter.end_overlapped(given.microbatch, given.given_at, given.sent_at)
        except Exception as error:
            self._fail(error)
