"""What the device can do at most: bytes per second that it reads, operations per second of its products."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gptj_serve.pipeline.stage_runner import sum_in_fp32

ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Rates:
    bytes_per_s: float
    operations_per_s: float  # of products of two matrices in the model's dtype


def measure_rates(device: torch.device, dtype: torch.dtype, num_bytes: int, size: int) -> Rates:
    """Bytes: the faster of a copy, which reads and writes them, and a sum. Both larger than any cache."""
    return Rates(_bytes_per_s(device, num_bytes), _operations_per_s(device, dtype, size))


def _bytes_per_s(device: torch.device, num_bytes: int) -> float:
    source = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_s = fastest_s(device, lambda: target.copy_(source))
    return max(2 * num_bytes / copy_s, num_bytes / fastest_s(device, source.sum))


def _operations_per_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / fastest_s(device, lambda: torch.mm(a, b))


def fastest_s(device: torch.device, work: Callable[[], object], repeats: int = 10) -> float:
    """Of one of `repeats` in a row."""
    work()
    times = []
    for _ in range(ROUNDS):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        times.append((time.perf_counter() - started) / repeats)
    return min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def described_sums() -> str:
    """How products are summed in this process."""
    matmul = torch.backends.cuda.matmul
    return (
        f"products of fp32: {torch.get_float32_matmul_precision()}; parts of sums rounded in bf16: "
        f"{matmul.allow_bf16_reduced_precision_reduction}, in fp16: {matmul.allow_fp16_reduced_precision_reduction}"
    )


@contextmanager
def sums_as_by_torchs_default() -> Iterator[None]:
    """For a peer: our stages have them in fp32."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    try:
        yield
    finally:
        sum_in_fp32()
