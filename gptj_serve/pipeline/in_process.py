"""The pipeline in one process: a thread per stage. For tests, laptops and the plain Python API."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from gptj_serve.errors import PipelineError
from gptj_serve.pipeline.stage_runner import StageRunner
from gptj_serve.pipeline.stage_status import describe_stage, memory_bytes
from gptj_serve.pipeline.step_meter import StepMeter
from gptj_serve.steps import MicroBatch, StepOutput


class InProcessPipeline:
    """Stages overlap as they do across processes: each has one thread, and torch releases the interpreter lock."""

    def __init__(self, runners: Sequence[StageRunner], meters: Sequence[StepMeter] | None = None) -> None:
        """`meters`, one for each stage, are told of its steps; by default each has a new one."""
        meters = [StepMeter() for _ in runners] if meters is None else meters
        pairs = zip(runners, meters, strict=True)
        self._stages = [_Stage(runner, index, meter) for index, (runner, meter) in enumerate(pairs)]
        self._num_recoveries = 0

    async def run(self, microbatch: MicroBatch) -> StepOutput:
        loop = asyncio.get_running_loop()
        result: Tensor | StepOutput | None = None
        sent_at: float | None = None
        try:
            for stage in self._stages:
                assert not isinstance(result, StepOutput)
                result, sent_at = await loop.run_in_executor(stage.thread, stage.run, microbatch, result, sent_at)
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
                "memory_bytes": memory_bytes(stage.runner.spec.device),
                "num_restarts": self._num_recoveries,
                **stage.meter.status(),
            }
            for index, stage in enumerate(self._stages)
        ]

    def close(self) -> None:
        for stage in self._stages:
            stage.thread.shutdown(wait=True, cancel_futures=True)


class _Stage:
    def __init__(self, runner: StageRunner, index: int, meter: StepMeter) -> None:
        self.runner = runner
        self.meter = meter
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"stage-{index}")

    def restart(self) -> None:
        self.runner.restart()
        self.meter.wait()

    def run(
        self, microbatch: MicroBatch, hidden: Tensor | None, sent_at: float | None
    ) -> tuple[Tensor | StepOutput, float]:
        """The step's result, and when it was ready for the next stage."""
        self.meter.begin(sent_at)
        result = self.runner.run(microbatch, hidden)
        self.meter.end(microbatch)
        self.meter.wait()
        return result, time.time()
