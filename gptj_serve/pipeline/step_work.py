"""What a stage's loop does with a microbatch: one step after the other, or on a device with more than one under way."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from gptj_serve.pipeline.gpu.gpu_runner import GPUStageRunner
from gptj_serve.pipeline.gpu.gpu_step import GPUStep
from gptj_serve.pipeline.stage_runner import StageRunner
from gptj_serve.pipeline.step_meter import StepMeter
from gptj_serve.steps import MicroBatch, StepOutput


class Outlet(Protocol):
    """Where what comes of a step goes."""

    def hand_on(self, microbatch_id: int, hidden: Tensor, wait: Callable[[], None]) -> None:
        """To the next stage; `wait` returns once the hidden states are there."""

    def answer(self, output: StepOutput) -> None:
        """To the engine. From one thread."""

    def fail(self, error: Exception) -> None: ...


class StepWork(Protocol):
    def run(self, microbatch: MicroBatch, hidden: Tensor | None, sent_at: float | None) -> None:
        """Hidden states [T, D] come from the stage before, which sent them at that time; None on the first stage."""

    def close(self) -> None:
        """Returns when no step is under way."""


def work_of(runner: StageRunner, meter: StepMeter, outlet: Outlet) -> StepWork:
    if isinstance(runner, GPUStageRunner):
        return OverlappedWork(runner, meter, outlet)
    return OrderlyWork(runner, meter, outlet)


class OrderlyWork:
    def __init__(self, runner: StageRunner, meter: StepMeter, outlet: Outlet) -> None:
        self._runner = runner
        self._meter = meter
        self._outlet = outlet
        meter.wait()

    def run(self, microbatch: MicroBatch, hidden: Tensor | None, sent_at: float | None) -> None:
        self._meter.begin(sent_at)
        result = self._runner.run(microbatch, hidden)
        if isinstance(result, StepOutput):
            self._outlet.answer(result)
        else:
            self._outlet.hand_on(microbatch.microbatch_id, result, self._runner.synchronize)
        self._runner.synchronize()  # for the meter; the next stage may be at it already
        self._meter.end(microbatch)
        self._meter.wait()

    def close(self) -> None:
        """None is under way between two calls."""


class OverlappedWork:
    """The loop's thread gives steps to the device and waits for none of them; another one waits for their ends."""

    def __init__(self, runner: GPUStageRunner, meter: StepMeter, outlet: Outlet) -> None:
        self._runner = runner
        self._meter = meter
        self._outlet = outlet
        self._ends = ThreadPoolExecutor(1, thread_name_prefix="step-ends")

    def run(self, microbatch: MicroBatch, hidden: Tensor | None, sent_at: float | None) -> None:
        step = self._runner.begin(microbatch, hidden)
        given_at = time.time()
        self._ends.submit(self._end, step, microbatch, given_at, sent_at)
        if step.hidden is not None:
            with self._runner.hidden_of(step) as states:
                self._outlet.hand_on(microbatch.microbatch_id, states, step.wait)

    def close(self) -> None:
        self._ends.shutdown()

    def _end(self, step: GPUStep, microbatch: MicroBatch, given_at: float, sent_at: float | None) -> None:
        try:
            if step.hidden is None:
                self._outlet.answer(self._runner.output(step))
            else:
                step.wait()
            self._meter.end_overlapped(microbatch, given_at, sent_at)
        except Exception as error:
            self._outlet.fail(error)
