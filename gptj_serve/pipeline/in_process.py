"""The pipeline in one process: a thread per stage. For tests, laptops and the plain Python API."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from gptj_serve.errors import PipelineError
from gptj_serve.pipeline.stage_runner import StageRunner
from gptj_serve.steps import MicroBatch, StepOutput


class InProcessPipeline:
    """Stages overlap as they do across processes: each has one thread, and torch releases the interpreter lock."""

    def __init__(self, runners: Sequence[StageRunner]) -> None:
        self._runners = runners
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"stage-{index}") for index, _ in enumerate(runners)]

    async def run(self, microbatch: MicroBatch) -> StepOutput:
        loop = asyncio.get_running_loop()
        result: Tensor | StepOutput | None = None
        try:
            for runner, thread in zip(self._runners, self._threads, strict=True):
                assert not isinstance(result, StepOutput)
                result = await loop.run_in_executor(thread, runner.run, microbatch, result)
        except Exception as error:
            raise PipelineError(f"microbatch {microbatch.microbatch_id} failed: {error!r}") from error
        assert isinstance(result, StepOutput)
        return result

    async def watch(self) -> None:
        """Threads are not lost."""
        await asyncio.Event().wait()

    async def recover(self) -> None:
        for runner, thread in zip(self._runners, self._threads, strict=True):
            await asyncio.get_running_loop().run_in_executor(thread, runner.restart)

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
