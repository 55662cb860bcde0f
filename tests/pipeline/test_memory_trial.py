"""What a stage measures before it makes its KV cache, on a device whose memory is counted by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from gptj_serve.errors import DeviceMemoryError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.stage import load_stage
from gptj_serve.pipeline.gpu.gpu_runner import GPUStageRunner
from gptj_serve.pipeline.gpu.sampler import GreedySampler
from gptj_serve.pipeline.kv_room import Knobs
from gptj_serve.pipeline.memory_trial import (
    CONTEXT_BYTES,
    GATHERED_BYTES,
    TrialLimits,
    measure_room,
    out_of_memory_named,
    run_largest,
)
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.steps import MicroBatch
from tests.pipeline.fake_device import FakeDevice
from tests.pipeline.reference_layers import ReferenceLayers

BLOCK_SIZE, N_POSITIONS, WIDTH, NUM_LAYERS = 8, 96, 32, 6
LIMITS = TrialLimits(max_microbatch_tokens=150, max_num_sequences=20, max_sequence_tokens=N_POSITIONS)
KNOBS = Knobs(4, "bfloat16", "none", 150, 20, gpu_memory_utilization=0.5)


@dataclass
class CountedMemory:
    """Of which others use some, and this process what its runners took: `taken`."""

    total_bytes: int = 1 << 30
    others_bytes: int = 0
    taken_bytes: int = 0
    num_releases: int = 0
    name: str = "a fake"
    capability: tuple[int, int] = (8, 0)
    runners: list[StageRunner] = field(default_factory=list)

    def free_and_total(self) -> tuple[int, int]:
        return self.total_bytes - self.others_bytes - self.reserved_bytes(), self.total_bytes

    def reserved_bytes(self) -> int:
        return self.taken_bytes + sum(runner.kv_cache_bytes for runner in self.runners)

    def release(self) -> None:
        self.runners.clear()
        self.num_releases += 1


class RecordingRunner(StageRunner):
    """Takes note of what it runs."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.ran: list[MicroBatch] = []

    def run(self, microbatch: MicroBatch, hidden: torch.Tensor | None) -> object:  # type: ignore[override]
        self.ran.append(microbatch)
        return super().run(microbatch, hidden)


def prepared(directory: Path, memory: CountedMemory, span: range) -> Callable[[int], StageRunner]:
    checkpoint = Checkpoint.open(directory)
    spec = StageSpec(span, 0, BLOCK_SIZE, torch.bfloat16, torch.device("cpu"), 90, kernels="torch")
    make = RecordingRunner.prepare(checkpoint, spec)

    def making(num_kv_blocks: int) -> StageRunner:
        runner = make(num_kv_blocks)
        memory.runners.append(runner)
        return runner

    return making


@pytest.mark.parametrize("span", [range(2), range(2, 4), range(4, 6)])
def test_what_is_not_the_cache_is_what_the_largest_microbatches_leave_in_use(
    tiny_gptj: Callable[..., Path], span: range
) -> None:
    memory = CountedMemory(others_bytes=1000, taken_bytes=500_000)
    make = prepared(tiny_gptj(), memory, span)
    room = measure_room(make, BLOCK_SIZE, LIMITS, memory, utilization=0.5)
    assert (room.device, room.total_bytes, room.budget_bytes) == ("a fake", 1 << 30, 1 << 29)
    assert room.used_bytes == 501_000
    assert room.block_bytes == 2 * len(span) * BLOCK_SIZE * WIDTH * 2 + GATHERED_BYTES * WIDTH * BLOCK_SIZE
    assert room.num_blocks == ((1 << 29) - 501_000) // room.block_bytes - 1
    assert memory.num_releases == 1
    assert make(3).weight_bytes == room.weight_bytes > 0


def test_on_a_shared_device_only_the_processs_own_bytes_count(tiny_gptj: Callable[..., Path]) -> None:
    memory = CountedMemory(others_bytes=1 << 29, taken_bytes=500_000)
    room = measure_room(prepared(tiny_gptj(), memory, range(6)), BLOCK_SIZE, LIMITS, memory, 0.8, share=0.5)
    assert room.budget_bytes == int((1 << 30) * 0.8 * 0.5)
    assert room.used_bytes == 500_000 + CONTEXT_BYTES


def test_the_largest_microbatches_are_as_large_as_can_come(tiny_gptj: Callable[..., Path]) -> None:
    memory = CountedMemory()
    ran: list[MicroBatch] = []

    class Memory(CountedMemory):
        def release(self) -> None:
            ran.extend(microbatch for runner in self.runners for microbatch in runner.ran)  # type: ignore[attr-defined]
            super().release()

    memory = Memory()
    measure_room(prepared(tiny_gptj(), memory, range(6)), BLOCK_SIZE, LIMITS, memory, 0.5)
    prompts, decoding, edited = ran
    assert prompts.num_tokens == 150
    assert [(row.start, row.end) for row in prompts.rows] == [(0, 96), (42, 96)]
    assert all(len(row.target_token_ids) == len(row.token_ids) for row in prompts.rows)
    assert [len(row.token_ids) for row in decoding.rows] == [1] * 20
    assert all(row.samples[0].warpers.top_p < 1 for row in decoding.rows)
    assert [len(row.token_ids) for row in edited.rows] == [1] * 20
    assert all(row.samples[0].edits and row.samples[0].num_top_logprobs for row in edited.rows)


@pytest.mark.parametrize("span", [range(3), range(3, 6)])
def test_a_runner_with_graphs_takes_the_trial_too(tiny_gptj: Callable[..., Path], span: range) -> None:
    """It refuses microbatches that it was not made for."""
    checkpoint = Checkpoint.open(tiny_gptj())
    cpu, device, memory = torch.device("cpu"), FakeDevice(), CountedMemory()
    stage = load_stage(checkpoint, span, torch.float32, cpu)

    def make(num_kv_blocks: int) -> StageRunner:
        spec = StageSpec(
            span, num_kv_blocks, BLOCK_SIZE, torch.float32, cpu, 90,
            max_num_sequences=LIMITS.max_num_sequences, max_microbatch_tokens=LIMITS.max_microbatch_tokens,
        )  # fmt: skip
        layers = ReferenceLayers(stage, num_kv_blocks, BLOCK_SIZE)
        runner = GPUStageRunner(stage, spec, layers, device, GreedySampler())
        memory.runners.append(runner)
        return runner

    room = measure_room(make, BLOCK_SIZE, LIMITS, memory, utilization=0.5)
    assert room.block_bytes == 2 * len(span) * BLOCK_SIZE * WIDTH * 4
    assert room.used_bytes == 0
    run_largest(make(room.num_blocks % 100), LIMITS)


def test_a_runner_is_as_new_after_the_trial(tiny_gptj: Callable[..., Path]) -> None:
    """The engine's first microbatch has the id 0 again."""
    runner = prepared(tiny_gptj(), CountedMemory(), range(6))(12)
    run_largest(runner, LIMITS)
    run_largest(runner, LIMITS)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_running_out_of_memory_names_what_to_lower(error: RuntimeError) -> None:
    memory = CountedMemory(total_bytes=15 << 30, others_bytes=14 << 30)
    with (
        pytest.raises(DeviceMemoryError) as raised,
        out_of_memory_named("weights of layers 0 to 6", 3 << 30, memory, KNOBS),
    ):
        raise error
    assert str(raised.value) == (
        "weights of layers 0 to 6 on a fake: needs 3.00 GiB; of 15.00 GiB 1.00 GiB were free. Under pipeline: raise "
        "gpu_memory_utilization=0.5 if nothing else uses the GPU; lower scheduler.max_microbatch_tokens=150 or "
        "scheduler.max_num_sequences=20; use quantization=int8 or fp8 instead of none; raise num_stages=4"
    )
    assert memory.num_releases == 1


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="a bug"), out_of_memory_named("weights", None, CountedMemory(), KNOBS):
        raise RuntimeError("a bug")
    with pytest.raises(torch.OutOfMemoryError), out_of_memory_named("weights", None, None, KNOBS):  # on a CPU
        raise torch.OutOfMemoryError("out of memory")
