"""What a stage's memory must hold besides its KV cache: found out by running its largest microbatches at start.

A runner with a small KV pool does them, captures its graphs if it has any, and is thrown away. torch keeps what it once
took from the device, so what is used afterwards is the most that was needed, with everything that is nobody's tensor:
the CUDA context, loaded kernels, workspaces, graphs. The runner with the real pool then does them again, so that no
step has to take memory from the device.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from msgspec.structs import replace

from gptj_serve.errors import DeviceMemoryError
from gptj_serve.pipeline.kv_room import Knobs, KVRoom, out_of_memory
from gptj_serve.pipeline.stage_runner import StageRunner
from gptj_serve.steps import LogitEdits, MicroBatch, Row, SampleSpec
from gptj_serve.types import Warpers

CONTEXT_BYTES = 1 << 29
"""Of a process on a GPU that it shares with other stages, besides what torch has taken: CUDA context, kernels, handles.
Which of them has how much can't be told from what is free. Not measured yet."""

GATHERED_BYTES = 12
"""Of each number of hidden width in the context, while PyTorch's kernels attend: keys and values are gathered in half
precision and again in fp32. Our own kernels read them where they lie."""


class DeviceMemory(Protocol):
    """What is asked of a device's memory. `CUDAMemory` asks torch."""

    @property
    def name(self) -> str:
        """Of the device."""

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA's compute capability."""

    def free_and_total(self) -> tuple[int, int]:
        """Bytes, whoever uses the rest."""

    def reserved_bytes(self) -> int:
        """Taken from the device by this process's tensors, and kept for later ones."""

    def release(self) -> None:
        """Give back what no tensor and no graph uses."""


class CUDAMemory:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.name: str = torch.cuda.get_device_name(device)
        self.capability: tuple[int, int] = torch.cuda.get_device_capability(device)

    def free_and_total(self) -> tuple[int, int]:
        torch.cuda.synchronize(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        return free, total

    def reserved_bytes(self) -> int:
        return int(torch.cuda.memory_reserved(self._device))

    def release(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class TrialLimits:
    """The largest microbatches that can come."""

    max_microbatch_tokens: int
    max_num_sequences: int
    max_sequence_tokens: int


def measure_room(
    make_runner: Callable[[int], StageRunner],
    block_size: int,
    limits: TrialLimits,
    memory: DeviceMemory,
    utilization: float,
    share: float = 1.0,
) -> KVRoom:
    """Of a stage whose weights are loaded, which may use `share` of the device's `utilization`."""
    num_blocks = -(-limits.max_sequence_tokens // block_size)
    runner = make_runner(num_blocks)
    run_largest(runner, limits)
    free_bytes, total_bytes = memory.free_and_total()
    used_bytes = total_bytes - free_bytes if share == 1 else memory.reserved_bytes() + CONTEXT_BYTES
    block_bytes = runner.kv_cache_bytes // (num_blocks + 1)
    gathered_bytes = GATHERED_BYTES * runner.stage.config.n_embd * block_size if runner.kernels == "torch" else 0
    room = KVRoom(
        device=memory.name,
        total_bytes=total_bytes,
        budget_bytes=int(total_bytes * utilization * share),
        used_bytes=used_bytes - runner.kv_cache_bytes,
        weight_bytes=runner.weight_bytes,
        block_bytes=block_bytes + gathered_bytes,
    )
    del runner
    memory.release()
    return room


def run_largest(runner: StageRunner, limits: TrialLimits) -> None:
    """The largest microbatches, of prompts and of decode steps; afterwards the runner is as before."""
    for microbatch in _largest(runner, limits):
        hidden = None
        if not runner.stage.is_first:
            width = runner.stage.config.n_embd
            hidden = torch.zeros(microbatch.num_tokens, width, dtype=runner.spec.dtype, device=runner.spec.device)
        runner.run(microbatch, hidden)
        runner.synchronize()
    runner.restart()


def _largest(runner: StageRunner, limits: TrialLimits) -> Iterator[MicroBatch]:
    """Prompts at the end of their contexts, with the log-probabilities of all their tokens; then a token for each of as
    many sequences as there may be, without edits and with. All write to the same blocks: nobody reads what comes of it.
    """
    num_tokens, length = limits.max_microbatch_tokens, limits.max_sequence_tokens
    blocks = list(range(-(-length // runner.spec.block_size)))
    has_lm_head = hasattr(runner.stage, "lm_head")
    samples = [SampleSpec(Warpers(temperature=1.0, top_k=50, top_p=0.9))] if has_lm_head else []
    sizes = [length] * (num_tokens // length) + [num_tokens % length] * (num_tokens % length > 0)
    yield MicroBatch(
        0,
        [
            Row(
                [0] * size,
                length - size,
                blocks,
                samples=samples,
                target_token_ids=[0] * size if has_lm_head else [],
                num_top_targets=1,
            )
            for size in sizes
        ],
    )
    num_rows = min(limits.max_num_sequences, num_tokens)
    yield MicroBatch(1, [Row([0], 0, blocks[:1], samples=samples)] * num_rows)
    if has_lm_head:
        edits = LogitEdits(repetition_penalty=2.0, seen_token_ids=[0])
        edited = [replace(sample, edits=edits, num_top_logprobs=1) for sample in samples]
        yield MicroBatch(2, [Row([0], 0, blocks[:1], samples=edited)] * num_rows)


@contextmanager
def out_of_memory_named(
    what: str, needed_bytes: int | None, memory: DeviceMemory | None, knobs: Knobs
) -> Iterator[None]:
    """Where the device has no more memory, raises `DeviceMemoryError`, which names what to lower."""
    try:
        free_bytes, total_bytes = (0, 0) if memory is None else memory.free_and_total()
        yield
    except (RuntimeError, MemoryError) as error:
        if memory is None or not _is_out_of_memory(error):
            raise
        memory.release()
        raise DeviceMemoryError(
            out_of_memory(f"{what} on {memory.name}", needed_bytes, free_bytes, total_bytes, knobs)
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    """torch's own allocator, the driver and cuBLAS each say it in another way."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text
