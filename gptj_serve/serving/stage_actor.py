"""The Ray actor around a stage: it loads, links and watches; steps and tensors never pass through Ray.

This module is imported by the engine's process too, which needs no torch: only the stage's own process, in `load`,
imports what does.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from gptj_serve.config import Kernels, Quantization
from gptj_serve.environment import keep_openmp_from_spinning
from gptj_serve.pipeline.core_claims import CoreClaim, available_cores, claim_cores, pin_process
from gptj_serve.pipeline.sockets import CurveKeys
from gptj_serve.pipeline.threads import threads_per_stage
from gptj_serve.serving.logs import log_to_stderr

if TYPE_CHECKING:
    from gptj_serve.pipeline.stage_loop import StageAddresses, StageLoop
    from gptj_serve.pipeline.stage_runner import StageRunner
    from gptj_serve.pipeline.step_meter import StepMeter, TracedStep


logger = logging.getLogger(__name__)


class StageSettings(NamedTuple):
    """What a stage actor is told, in plain values."""

    checkpoint_dir: str
    layers: tuple[int, int]
    num_kv_blocks: int
    block_size: int
    dtype: str
    num_token_ids: int
    num_stages: int
    num_threads: int | None
    pin_cores: bool
    uses_gpu: bool
    heads: dict[str, str]  # name → directory
    deterministic: bool
    quantization: Quantization
    kernels: Kernels
    logs_json: bool = False
    weights_digest: str = ""  # of checkpoint and heads that the pipeline started with; empty: any


class StageReport(NamedTuple):
    """What a stage tells of itself when it is asked."""

    measured: dict[str, Any]  # the fields of `api.status.StageStatus` that change
    totals: dict[str, float]  # since the process started, for counters
    traced: list["TracedStep"]  # since it was last asked


class GPTJStage:
    """One stage. Its methods run in threads of their own, so `watch` can wait while others are called."""

    def __init__(self, settings: StageSettings) -> None:
        log_to_stderr(as_json=settings.logs_json)
        self._settings = settings
        self._meter: StepMeter | None = None
        self._runner: StageRunner | None = None
        self._loop: StageLoop | None = None
        self._cores: CoreClaim | None = None

    def load(self) -> dict[str, Any]:
        """Load the weights; returns a description of the stage. Raises `CheckpointError`, also if the files are no
        longer those that the pipeline started with,
        and `ConfigError` where the machine can't be deterministic."""
        settings = self._settings
        keep_openmp_from_spinning()
        num_threads = threads_per_stage(settings.num_stages, settings.num_threads)
        if settings.pin_cores:
            self._pin_cores(num_threads)
        if settings.kernels == "auto" and not settings.uses_gpu:
            from gptj_serve.kernels.cpu_library import start_compiling

            start_compiling()  # while torch is imported
        import torch

        from gptj_serve.model.checkpoint import Checkpoint
        from gptj_serve.model.heads import open_heads
        from gptj_serve.model.loading_progress import ProgressLines
        from gptj_serve.model.version import require_weights
        from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
        from gptj_serve.pipeline.stage_status import describe_stage
        from gptj_serve.pipeline.step_meter import StepMeter

        device = torch.device("cuda" if settings.uses_gpu else "cpu")
        torch.set_num_threads(num_threads)
        spec = StageSpec(
            span=range(*settings.layers),
            num_kv_blocks=settings.num_kv_blocks,
            block_size=settings.block_size,
            dtype=getattr(torch, settings.dtype),
            device=device,
            num_token_ids=settings.num_token_ids,
            deterministic=settings.deterministic,
            quantization=settings.quantization,
            kernels=settings.kernels,
        )
        checkpoint = Checkpoint.open(Path(settings.checkpoint_dir))
        heads = open_heads({name: Path(directory) for name, directory in settings.heads.items()}, checkpoint)
        if settings.weights_digest:
            require_weights(checkpoint, heads, settings.weights_digest)
        first, end = settings.layers
        progress = ProgressLines(lambda line: logger.info("layers %d to %d: %s", first, end - 1, line))
        self._runner = StageRunner.load(checkpoint, spec, heads, progress)
        self._meter = StepMeter()
        return {
            **describe_stage(self._runner),
            "node_ip": ray.util.get_node_ip_address(),
            "node_id": ray.get_runtime_context().get_node_id(),
        }

    def _pin_cores(self, num_threads: int) -> None:
        """Before any library makes threads."""
        first, end = self._settings.layers
        cores = available_cores()
        self._cores = claim_cores(num_threads, cores)
        if self._cores is None:
            logger.warning(
                "layers %d to %d: on any core: pin_cores needs %d, and of %d others have claimed too many",
                *(first, end - 1, num_threads, len(cores)),
            )
            return
        pin_process(self._cores.cores)
        logger.info("layers %d to %d: on cores %s", first, end - 1, ", ".join(map(str, self._cores.cores)))

    def report(self) -> StageReport:
        from gptj_serve.pipeline.stage_status import memory_bytes

        assert self._runner is not None
        assert self._meter is not None
        measured = {"memory_bytes": memory_bytes(self._runner.spec.device), **self._meter.status()}
        return StageReport(measured, self._meter.totals(), self._meter.take_traced())

    def bind(self, address: str | None, keys: CurveKeys | None) -> "StageAddresses":
        """Make new links, listening at an ipc address, or (None) on any TCP port of this node."""
        from gptj_serve.pipeline.stage_loop import StageLoop

        assert self._runner is not None
        self._loop = StageLoop(self._runner, keys, self._meter)
        return self._loop.bind(address or f"tcp://{ray.util.get_node_ip_address()}")

    def start(self, next_address: str) -> None:
        """Raises `PipelineError` if the link to the next stage can't be made."""
        assert self._loop is not None
        self._loop.start(next_address)
        self._loop.wait_until_linked()

    def stop(self) -> None:
        """Close the links. Doesn't return while a step hangs; the caller then takes this stage for lost."""
        if self._loop is not None:
            self._loop.stop()

    def watch(self) -> str | None:
        """What ended the stage's loop, as soon as it does; None when the links are closed."""
        assert self._loop is not None
        error = self._loop.failure.exception()
        return None if error is None else f"{type(error).__name__}: {error}"
