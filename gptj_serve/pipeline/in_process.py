"""The pipeline in one process: a thread per stage. For tests, laptops and the plain Python API."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from gptj_serve.errors import PipelineError
from gptj_serve.pipeline.gpu.gpu_runner import GPUStageRunner
from gptj_serve.pipeline.gpu.gpu_step import DeviceHidden, GPUStep
from gptj_serve.pipeline.stage_runner import StageRunner
from gptj_serve.pipeline.stage_status import describe_stage, memory_bytes
from gptj_serve.pipeline.step_meter import StepMeter
from gptj_serve.steps import MicroBatch, StepOutput

Hidden = Tensor | DeviceHidden
"""Of a stage's last layer, for the next stage."""


class InProcessPipeline:
    """Stages overlap as they do across processes: each has one thread, and torch releases the interpreter lock."""

    def __init__(self, runners: Sequence[StageRunner], meters: Sequence[StepMeter] | None = None) -> None:
        """`meters`, one for each stage, are told of its steps; by default each has a new one."""
        meters = [StepMeter() for _ in runners] if meters is None else meters
        pairs = zip(runners, meters, strict=True)
        self._stages = [
            (_GPUStage if isinstance(runner, GPUStageRunner) else _Stage)(runner, index, meter)
            for index, (runner, meter) in enumerate(pairs)
        ]
        self._num_recoveries = 0

    async def run(self, microbatch: MicroBatch) -> StepOutput:
        result: Hidden | StepOutput | None = None
        sent_at: float | None = None
        try:
            for stage in self._stages:
                assert not isinstance(result, StepOutput)
                result, sent_at = await stage.run(microbatch, result, sent_at)
        except Exception as error:
            raise PipelineError(f"microbatch {microbatch.microbatch_id} failed: {error!r}") from error
        assert isinstance(result, StepOutput)
        return result

    async def watch(self) -> None:
        """Threads are not lost."""
        await asyncio.Event().wait()

    async def recover(self) -> None:
        self._num_recoveries += 1
        for stage in self._stages:
            await asyncio.get_running_loop().run_in_executor(stage.thread, stage.restart)

    def stage_statuses(self) -> list[dict[str, Any]]:
        """As `api.status.StageStatus`."""
        return [
            {
                "stage_index": index,
                **describe_stage(stage.runner),
                "node_ip": "127.0.0.1",
                "handoff": "in_process" if index else None,
                "memory_bytes": memory_bytes(stage.runner.spec.device),
                "num_restarts": self._num_recoveries,
                **stage.meter.status(),
            }
            for index, stage in enumerate(self._stages)
        ]

    def close(self) -> None:
        for stage in self._stages:
            stage.close()


class _Stage:
    def __init__(self, runner: StageRunner, index: int, meter: StepMeter) -> None:
        self.runner = runner
        self.meter = meter
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"stage-{index}")

    async def run(
        self, microbatch: MicroBatch, hidden: Hidden | None, sent_at: float | None
    ) -> tuple[Hidden | StepOutput, float]:
        """The step's result, and when it was ready for the next stage."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._run, microbatch, hidden, sent_at)

    def restart(self) -> None:
        self.runner.restart()
        self.meter.wait()

    def close(self) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)

    def _run(
        self, microbatch: MicroBatch, hidden: Hidden | None, sent_at: float | None
    ) -> tuple[Hidden | StepOutput, float]:
        assert not isinstance(hidden, DeviceHidden)
        self.meter.begin(sent_at)
        result = self.runner.run(microbatch, hidden)
        self.meter.end(microbatch)
        self.meter.wait()
        return result, time.time()


class _GPUStage(_Stage):
    """Its thread gives steps to the device and waits for none of them; another one waits for what comes of them.

    The next stage gets hidden states that are still to come: its device waits for them, not its thread.
    """

    runner: GPUStageRunner

    def __init__(self, runner: StageRunner, index: int, meter: StepMeter) -> None:
        super().__init__(runner, index, meter)
        self._results = ThreadPoolExecutor(1, thread_name_prefix=f"stage-{index}-results")

    async def run(
        self, microbatch: MicroBatch, hidden: Hidden | None, sent_at: float | None
    ) -> tuple[Hidden | StepOutput, float]:
        loop = asyncio.get_running_loop()
        step, given_at = await loop.run_in_executor(self.thread, self._begin, microbatch, hidden)
        if step.hidden is not None:
            self._results.submit(self._end, step, microbatch, given_at, sent_at)
            return step.hidden, given_at
        output = await loop.run_in_executor(self._results, self._output, step, microbatch, given_at, sent_at)
        return output, time.time()

    def close(self) -> None:
        super().close()
        self._results.shutdown(wait=True, cancel_futures=True)

    def _begin(self, microbatch: MicroBatch, hidden: Hidden | None) -> tuple[GPUStep, float]:
        step = self.runner.begin(microbatch, hidden)
        return step, time.time()

    def _output(self, step: GPUStep, microbatch: MicroBatch, given_at: float, sent_at: float | None) -> StepOutput:
        output = self.runner.output(step)
        self.meter.end_overlapped(microbatch, given_at, sent_at)
        return output

    def _end(self, step: GPUStep, microbatch: MicroBatch, given_at: float, sent_at: float | None) -> None:
        """What goes wrong on the device, the last stage finds too."""
        step.wait()
        self.meter.end_overlapped(microbatch, given_at, sent_at)
