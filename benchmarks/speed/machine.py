"""What the machine is and can do: facts, read bandwidth by threads, and operations per second of large products.

It is measured in a process of its own, torch's bf16 product last: some machines end a process there (SIGILL), and then
there is no such rate.
"""

import importlib.metadata
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gptj_serve.pipeline.threads import num_usable_cores

FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8", "amx_tile")
PACKAGES = ("gptj_serve", "torch", "transformers", "ctranslate2")
PRECISIONS = ("fp32", "bf16", "int8")
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Size:
    """Of what is measured."""

    read_bytes: int
    product: int  # M = N = K


FULL, QUICK = Size(1 << 30, 3072), Size(64 << 20, 256)


def facts(threads: int) -> dict[str, Any]:
    cpu = _cpuinfo()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cores": num_usable_cores(),
        "features": [feature for feature in FEATURES if feature in flags],
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def rates(threads: int, size: Size) -> dict[str, Any]:
    """`read_bytes_per_s` by threads (1, 2, 4, ... and all); `operations_per_s` by precision, by whose product it is.

    A precision that nothing here computes has none.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, threads, size), daemon=True)
    process.start()
    theirs.close()
    reads: dict[int, float] = {}
    operations: dict[str, dict[str, float]] = {precision: {} for precision in PRECISIONS}
    try:
        while True:
            what, whose, rate = ours.recv()
            if what == "read":
                reads[whose] = rate
            else:
                operations[what][whose] = rate
    except EOFError:
        process.join()
    return {"read_bytes_per_s": reads, "operations_per_s": operations}


# ------------------------------------------------------------------------------------------------ in a process


def _measure(pipe: Connection, threads: int, size: Size) -> None:
    import torch

    for count in sorted({threads, *(1 << power for power in range(threads.bit_length()))}):
        torch.set_num_threads(count)
        pipe.send(("read", count, _read_rate(size)))
    torch.set_num_threads(threads)
    num_operations = 2 * size.product**3
    for precision, whose, product in _products(size.product):
        pipe.send((precision, whose, num_operations / _fastest(product)))


def _read_rate(size: Size) -> float:
    """The better of a sum and a product with a vector."""
    import torch

    data = torch.ones(size.read_bytes // 4)
    matrix, vector = data.view(-1, 4096), torch.ones(4096)
    return data.nbytes / min(_fastest(lambda: data.sum()), _fastest(lambda: matrix @ vector))


def _products(n: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Of two n x n matrices: precision, whose, and the product; what may end the process comes last."""
    import torch

    own = {"fp32": "FLOAT32", "int8": "INT8", "bf16": "BFLOAT16"}
    a, b = torch.randn(n, n), torch.randn(n, n)
    yield "fp32", "torch", lambda: a @ b
    bytes_a, bytes_b = (torch.randint(-127, 128, (n, n), dtype=torch.int8) for _ in range(2))
    yield "int8", "torch", lambda: torch._int_mm(bytes_a, bytes_b)
    for precision, operand_type in own.items():
        if (linear := _own_linear(operand_type, n)) is not None:
            yield precision, "ours", lambda linear=linear: linear(a)
    half_a, half_b = a.bfloat16(), b.bfloat16()
    yield "bf16", "torch", lambda: half_a @ half_b


def _own_linear(operand_type: str, n: int) -> Callable[[Any], object] | None:
    """A layer on our kernels, fp32 in and out; None where they don't run."""
    import torch

    from gptj_serve.errors import GPTJServeError
    from gptj_serve.kernels.weights import OperandType, PackedLinear

    try:
        return PackedLinear(torch.nn.Linear(n, n, bias=False), OperandType[operand_type])
    except GPTJServeError:
        return None


def _fastest(run: Callable[[], object]) -> float:
    """Seconds, of several."""
    times = []
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _cpuinfo() -> dict[str, str]:
    """Of the first core; empty where there is no /proc."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    lines = file.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
