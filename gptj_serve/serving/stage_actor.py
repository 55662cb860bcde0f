"""The Ray actor around a stage: it loads, links and watches; steps and tensors never pass through Ray.

This module is imported by the engine's process too, which needs no torch: only the stage's own process, in `load`,
imports what does.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from gptj_serve.config import HandoffKind, Kernels, Quantization
from gptj_serve.environment import keep_openmp_from_spinning
from gptj_serve.errors import ConfigError
from gptj_serve.gpus import missing_capability
from gptj_serve.pipeline.core_claims import CoreClaim, available_cores, claim_cores, pin_process
from gptj_serve.pipeline.kv_room import Knobs, KVRoom
from gptj_serve.pipeline.sockets import CurveKeys
from gptj_serve.pipeline.threads import threads_per_stage
from gptj_serve.serving.logs import log_to_stderr

if TYPE_CHECKING:
    from gptj_serve.pipeline.memory_trial import DeviceMemory, TrialLimits
    from gptj_serve.pipeline.stage_loop import StageAddresses, StageLoop
    from gptj_serve.pipeline.stage_runner import StageRunner
    from gptj_serve.pipeline.step_meter import StepMeter, TracedStep


logger = logging.getLogger(__name__)


class StageSettings(NamedTuple):
    """What a stage actor is told, in plain values."""

    checkpoint_dir: str
    layers: tuple[int, int]
    num_kv_blocks: int | None  # None: not known before all stages have measured what room they have
    block_size: int
    dtype: str  # "auto": not known before all stages have told what their devices can
    weight_bytes: int  # by plan
    num_token_ids: int
    num_stages: int
    num_threads: int | None
    pin_cores: bool
    uses_gpu: bool
    gpu_share: float  # of one device, that the stage may use
    max_sequence_tokens: int
    knobs: Knobs
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

    def __init__(self, settings: StageSettings, memory: "DeviceMemory | None" = None) -> None:
        """`memory` is that of the stage's device; by default a GPU's as torch sees it, and none of a CPU's."""
        log_to_stderr(as_json=settings.logs_json)
        self._settings = settings
        self._memory = memory
        self._meter: StepMeter | None = None
        self._make_runner: Callable[[int], StageRunner] | None = None
        self._runner: StageRunner | None = None
        self._loop: StageLoop | None = None
        self._cores: CoreClaim | None = None

    def capability(self) -> tuple[int, int]:
        """CUDA's compute capability of the stage's GPU."""
        self._open_device()
        assert self._memory is not None
        return self._memory.capability

    def load(self, dtype: str) -> None:
        """Load the weights. Raises `CheckpointError`, also if the files are no longer those that the pipeline started
        with, `ConfigError` where the machine can't do what is asked, and `DeviceMemoryError`."""
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
        from gptj_serve.pipeline.memory_trial import out_of_memory_named
        from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec

        self._open_device()
        device = torch.device("cuda" if settings.uses_gpu else "cpu")
        torch.set_num_threads(num_threads)
        spec = StageSpec(
            span=range(*settings.layers),
            num_kv_blocks=settings.num_kv_blocks or 0,  # `allocate` says
            block_size=settings.block_size,
            dtype=getattr(torch, dtype),
            device=device,
            num_token_ids=settings.num_token_ids,
            deterministic=settings.deterministic,
            quantization=settings.quantization,
            kernels=settings.kernels,
            max_num_sequences=settings.knobs.max_num_sequences,
            max_microbatch_tokens=settings.knobs.max_microbatch_tokens,
        )
        checkpoint = Checkpoint.open(Path(settings.checkpoint_dir))
        heads = open_heads({name: Path(directory) for name, directory in settings.heads.items()}, checkpoint)
        if settings.weights_digest:
            require_weights(checkpoint, heads, settings.weights_digest)
        first, end = settings.layers
        progress = ProgressLines(lambda line: logger.info("layers %d to %d: %s", first, end - 1, line))
        with out_of_memory_named(f"weights of {self._own_layers}", settings.weight_bytes, self._memory, settings.knobs):
            self._make_runner = StageRunner.prepare(checkpoint, spec, heads, progress)

    def measure(self) -> KVRoom:
        """What is left for the KV cache, once the weights are loaded. Raises `DeviceMemoryError`."""
        from gptj_serve.pipeline.memory_trial import measure_room, out_of_memory_named

        settings, knobs = self._settings, self._settings.knobs
        assert self._make_runner is not None
        assert self._memory is not None
        with out_of_memory_named(f"the largest microbatch of {self._own_layers}", None, self._memory, knobs):
            return measure_room(
                self._make_runner,
                settings.block_size,
                self._trial_limits,
                self._memory,
                knobs.gpu_memory_utilization,
                settings.gpu_share,
            )

    def allocate(self, num_kv_blocks: int) -> dict[str, Any]:
        """Make the KV cache, and with it be ready for links; returns a description of the stage.

        Raises `ConfigError` where the machine can't be deterministic, and `DeviceMemoryError`.
        """
        from gptj_serve.pipeline.memory_trial import out_of_memory_named, run_largest
        from gptj_serve.pipeline.stage_status import describe_stage, gpu_uuid
        from gptj_serve.pipeline.step_meter import StepMeter

        assert self._make_runner is not None
        what = f"KV cache of {num_kv_blocks} blocks, and the largest microbatch, of {self._own_layers}"
        with out_of_memory_named(what, None, self._memory, self._settings.knobs):
            self._runner = self._make_runner(num_kv_blocks)
            if self._memory is not None:
                run_largest(self._runner, self._trial_limits)  # so that no step has to take memory for it
        self._meter = StepMeter()
        return {
            **describe_stage(self._runner),
            "node_ip": ray.util.get_node_ip_address(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "gpu_uuid": gpu_uuid(self._runner.spec.device),
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

    def bind(self, address: str | None, keys: CurveKeys | None, handoff: HandoffKind = "zmq") -> "StageAddresses":
        """Make new links, listening at an ipc address, or (None) on any TCP port of this node.

        Hidden states from the stage before come by `handoff`.
        """
        from gptj_serve.pipeline.stage_loop import StageLoop

        assert self._runner is not None
        self._loop = StageLoop(self._runner, keys, self._meter)
        return self._loop.bind(address or f"tcp://{ray.util.get_node_ip_address()}", handoff)

    def start(self, next_address: str, handoff: HandoffKind = "zmq", tensors: str = "") -> None:
        """Towards the next stage, by the handoff that it is bound for, or the engine.

        Raises `PipelineError` if the links to either side can't be made.
        """
        assert self._loop is not None
        self._loop.start(next_address, handoff, tensors)
        self._loop.wait_until_linked()

    def stop(self) -> None:
        """Close the links. Doesn't return while a step hangs, and raises `PipelineError` if the device does no more
        work for this process; the caller then takes this stage for lost."""
        if self._loop is not None:
            self._loop.stop()

    def watch(self) -> str | None:
        """What ended the stage's loop, as soon as it does; None when the links are closed."""
        assert self._loop is not None
        error = self._loop.failure.exception()
        return None if error is None else f"{type(error).__name__}: {error}"

    def _open_device(self) -> None:
        """Raises `ConfigError` for what the device can't do."""
        if self._settings.uses_gpu and self._memory is None:
            import torch

            from gptj_serve.pipeline.memory_trial import CUDAMemory

            self._memory = CUDAMemory(torch.device("cuda"))
        if self._memory is not None:
            quantization = self._settings.quantization
            missing = missing_capability(quantization, self._memory.capability)
            if missing is not None:
                raise ConfigError(f"pipeline.quantization={quantization}: {self._memory.name} {missing}")

    @property
    def _own_layers(self) -> str:
        first, end = self._settings.layers
        return f"layers {first} to {end - 1}"

    @property
    def _trial_limits(self) -> "TrialLimits":
        from gptj_serve.pipeline.memory_trial import TrialLimits

        knobs = self._settings.knobs
        return TrialLimits(knobs.max_microbatch_tokens, knobs.max_num_sequences, self._settings.max_sequence_tokens)
