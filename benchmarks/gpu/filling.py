"""What the host does for each step before the device can begin: the time to fill a step's pinned memory."""

import statistics
import time

import torch
from torch import Tensor

from benchmarks.gpu.random_stages import random_prompts
from gptj_serve.pipeline.gpu.buckets import DecodeBuckets
from gptj_serve.pipeline.gpu.step_buffers import Limits, StepBuffers
from gptj_serve.pipeline.gpu.step_plan import plan_step
from gptj_serve.steps import Row

LIMITS = Limits(
    dtype=torch.bfloat16,
    num_token_ids=50400,
    num_sampled_ids=50257,
    num_positions=2048,
    num_kv_blocks=20000,
    block_size=16,
    max_rows=256,
    max_tokens=512,
)
REPEATS = 200


class _Nowhere:
    """A device and its stream that take no time. Only filling is measured."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    zeros = pinned

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Not at all."""

    def record(self) -> "_Nowhere":
        return self

    def wait(self) -> None:
        """For nothing."""


def filling() -> dict[str, float]:
    """Microseconds for a decode step, by its rows and the blocks of each."""
    nowhere = _Nowhere()
    buffers = StepBuffers(nowhere, nowhere, LIMITS)  # type: ignore[arg-type]
    buckets = DecodeBuckets(LIMITS.max_rows, LIMITS.max_blocks)
    found = {}
    for num_rows in (1, 32, 256):
        for num_blocks in (16, 64):
            tables = random_prompts(num_rows, num_blocks, LIMITS.num_kv_blocks)
            rows = [Row([7], 16 * num_blocks - 3, table) for table in tables]
            times = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                buffers.put(plan_step(rows, buckets, None).shape, rows)
                times.append(time.perf_counter() - started)
            name = f"filling a step of {num_rows} rows of {num_blocks} blocks"
            found[name] = statistics.median(times) * 1e6
            print(f"{name}: {found[name]:.0f} us")
    return found
