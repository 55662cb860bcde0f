"""Compiles the kernels of GPT-J 6B's layers to machine code for several architectures, and prints what each takes.

Where there is the least shared memory also with the largest heads. Needs no GPU: `GPULayers` launches them as always,
on tensors of a CPU, with a driver that compiles and does not run. The JSON that it prints says of each kernel its
registers, bytes of stack (spilled registers) and of shared memory, and whether its products are on tensor cores; and
what was compiled for microbatches of other sizes. Run it with `python -m tests.kernels.gpu.compiled`, without
TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from gptj_serve.kernels.gpu.availability import MAX_HEAD_DIM
from gptj_serve.kernels.gpu.layers import GPULayers
from gptj_serve.kernels.gpu.rows import DeviceRows
from gptj_serve.kernels.gpu.tiles import choose_tiles
from gptj_serve.model.config import GPTJConfig

CPU = torch.device("cpu")
WIDTH, HEAD_DIM = 4096, 256
ARCHITECTURES = {(9, 0): 227, (8, 0): 163, (8, 6): 99}
"""And KiB of shared memory that a program can have."""

CASES = [
    *((capability, torch.bfloat16, HEAD_DIM) for capability in ARCHITECTURES),
    ((9, 0), torch.float16, HEAD_DIM),
    ((8, 0), torch.float32, HEAD_DIM),
    ((9, 0), torch.float32, HEAD_DIM),
    ((8, 6), torch.bfloat16, MAX_HEAD_DIM),
    ((8, 6), torch.float32, MAX_HEAD_DIM),
]


@dataclass(frozen=True)
class Compiled:
    name: str
    architecture: int
    dtype: str
    head_dim: int
    num_registers: int
    stack_bytes: int
    shared_bytes: int
    has_tensor_core_products: bool
    has_wide_loads: bool


class CompilingDriver:
    """As much of a driver as a launch asks for."""

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []
        self.capability, self.dtype, self.head_dim = (0, 0), "", 0
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=self._properties)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.get_current_device(), 32)

    def get_current_device(self) -> int:
        """As if each architecture were a device."""
        return self.capability[0] * 10 + self.capability[1]

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None

    def _properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": ARCHITECTURES[self.capability] << 10}

    def _load(self, name: str, binary: bytes, shared_bytes: int, device: int) -> tuple[int, int, int, int, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
        registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
        self.compiled.append(
            Compiled(
                name,
                self.get_current_device(),
                self.dtype,
                self.head_dim,
                registers,
                stack,
                shared_bytes,
                "HGMMA" in code or "HMMA" in code,
                re.search(r"LDG(STS)?\.E\S*\.128", code) is not None,
            )
        )
        return 1, 1, registers, stack, 1024


def _cuobjdump(option: str, file: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class EmptyLinear:
    """A product's output without the product."""

    kind = "native"
    num_bytes = 0

    def __init__(self, num_outputs: int) -> None:
        self._num_outputs = num_outputs

    def __call__(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self._num_outputs)


class CapableLayers(GPULayers):
    """With the tiles of an architecture that isn't here."""

    def __init__(self, config: GPTJConfig, dtype: torch.dtype, capability: tuple[int, int]) -> None:
        width, inner = config.n_embd, config.inner_dim
        vectors = {name: torch.zeros(width, dtype=dtype) for name in ("norm_weight", "norm_bias", "fc_out_bias")}
        block: Any = SimpleNamespace(
            inward=EmptyLinear(3 * width + inner), outward=EmptyLinear(width),
            fc_in_bias=torch.zeros(inner, dtype=dtype), **vectors,
        )  # fmt: skip
        super().__init__(config, [block, block], 8, 16, dtype, CPU, num_sms=132)
        self._tiles = choose_tiles(capability, dtype, config.head_dim)


def _rows(num_tokens: int, num_rows: int, max_blocks: int, offset: int = 0) -> DeviceRows:
    """With an `offset` in tensors that begin anywhere in memory, as parts of others do."""
    zeros = lambda n: torch.zeros(offset + n, dtype=torch.int32)[offset:]  # noqa: E731
    return DeviceRows(
        zeros(num_tokens), zeros(num_tokens), zeros(num_tokens), zeros(num_rows + 1), zeros(num_rows),
        zeros(num_rows * max_blocks).view(num_rows, max_blocks), num_tokens,
    )  # fmt: skip


def main() -> None:
    driver = CompilingDriver()
    triton.runtime.driver.set_active(driver)
    for driver.capability, dtype, driver.head_dim in CASES:
        driver.dtype = str(dtype).removeprefix("torch.")
        config = GPTJConfig(n_layer=2, n_embd=WIDTH, n_head=WIDTH // driver.head_dim)
        layers = CapableLayers(config, dtype, driver.capability)
        for rows in (_rows(1, 1, 128), _rows(3, 2, 4)):  # with splits and without
            layers.run(torch.zeros(rows.num_tokens, WIDTH, dtype=dtype), rows)
    kernels = [asdict(kernel) for kernel in driver.compiled]
    for sizes in ((32, 16, 128), (1, 1, 40), (5, 4, 3)):
        rows = _rows(*sizes, offset=1)
        layers.run(torch.zeros(rows.num_tokens, WIDTH, dtype=dtype), rows)
    later = [kernel.name for kernel in driver.compiled[len(kernels) :]]
    json.dump({"kernels": kernels, "compiled_later": later}, sys.stdout)


if __name__ == "__main__":
    main()
