"""Tile sizes of the kernels, by device and type.

None of them has been measured yet: they were chosen so that the compiled kernels spill no registers and fit into the
shared memory of each architecture. `benchmarks/gpu_kernels.py` times the candidates on a device.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """`m` queries against `n` keys at a time; `num_stages` tiles of keys and values are on their way at once."""

    m: int
    n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Tiles:
    decode: Tile  # of attention, for rows of one token
    chunk: Tile  # for longer ones
    elements: int = 1024  # that a program of the other kernels works on, where it is free to choose


def choose_tiles(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> Tiles:
    """By compute capability; None is a CPU, where kernels are interpreted: there it is programs that take time."""
    if capability is None:
        return Tiles(Tile(16, 64, 4, 2), Tile(32, 64, 4, 2), elements=1 << 14)
    if dtype == torch.float32:  # products without tensor cores, in registers, of which larger tiles need too many
        return Tiles(Tile(16, 16, 4, 2), Tile(16, 16, 4, 2))
    if head_dim > 256:
        return Tiles(Tile(16, 32, 8, 3), Tile(32, 32, 8, 2))
    if capability[0] in (9, 10):  # 227 KiB of shared memory, products of 64 rows and more
        return Tiles(Tile(16, 64, 4, 3), Tile(128, 64, 8, 2))
    if capability == (8, 0):  # 163 KiB
        return Tiles(Tile(16, 64, 4, 3), Tile(64, 64, 8, 2))
    return Tiles(Tile(16, 64, 4, 3), Tile(64, 32, 8, 2))  # 99 KiB


def capability_of(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def num_multiprocessors(device: torch.device) -> int:
    """1 for a CPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
