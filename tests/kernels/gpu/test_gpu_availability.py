"""When the layers can run on the kernels for GPUs, and with which tiles."""

import pytest
import torch

from gptj_serve.kernels.gpu.availability import obstacle
from gptj_serve.kernels.gpu.tiles import choose_tiles
from gptj_serve.model.config import GPTJConfig


@pytest.mark.parametrize(
    ("config", "dtype", "device_type", "reason"),
    [
        (GPTJConfig(), torch.bfloat16, "cpu", "they are for CUDA devices, not for cpu"),
        (GPTJConfig(), torch.float64, "cuda", "they have no float64"),
        (GPTJConfig(n_head=4), torch.bfloat16, "cuda", "heads have at most 512 dimensions, not 1024"),
    ],
)
def test_what_is_in_the_way(config: GPTJConfig, dtype: torch.dtype, device_type: str, reason: str) -> None:
    assert obstacle(config, dtype, torch.device(device_type)) == reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", [None, (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("head_dim", [16, 64, 256, 512])
def test_tiles_are_such_as_kernels_take(dtype: torch.dtype, capability: tuple[int, int] | None, head_dim: int) -> None:
    tiles = choose_tiles(capability, dtype, head_dim)
    for number in (
        *(n for tile in (tiles.decode, tiles.chunk) for n in (tile.m, tile.n, tile.num_warps)),
        tiles.elements,
    ):
        assert number & (number - 1) == 0
    assert min(tiles.decode.m, tiles.decode.n, tiles.chunk.m, tiles.chunk.n) >= 16
