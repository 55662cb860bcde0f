"""Microbatches as `DeviceRows`, with padding, and `GPULayers` behind the interface of the other layers."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from gptj_serve.kernels.gpu.layers import GPULayers
from gptj_serve.kernels.gpu.rows import DeviceRows
from gptj_serve.kernels.gpu.weights import GPUBlock
from gptj_serve.model.attention import PagedRow
from gptj_serve.model.stage import GPTJStage
from tests.kernels.packed import BLOCK_SIZE, NUM_BLOCKS


def device_rows(
    rows: Sequence[PagedRow], block_size: int, padding_block: int, device: torch.device,
    num_padding_tokens: int = 0, num_padding_rows: int = 0, num_padding_blocks: int = 0,
    max_row_tokens: int | None = None,
) -> DeviceRows:  # fmt: skip
    sizes = [row.num_tokens for row in rows]
    max_blocks = max(len(row.block_table) for row in rows) + num_padding_blocks
    positions = [position for row in rows for position in range(row.start, row.end)]
    slots = [
        row.block_table[position // block_size] * block_size + position % block_size
        for row in rows
        for position in range(row.start, row.end)
    ]
    starts = [sum(sizes[:i]) for i in range(len(rows))] + [sum(sizes)] * (num_padding_rows + 1)
    tables = [[*row.block_table, *[padding_block] * (max_blocks - len(row.block_table))] for row in rows]
    tables += [[padding_block] * max_blocks] * num_padding_rows
    ints = lambda values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    return DeviceRows(
        token_ids=ints([0] * (sum(sizes) + num_padding_tokens)),
        positions=ints(positions + [0] * num_padding_tokens),
        slots=ints(slots + [padding_block * block_size] * num_padding_tokens),
        row_starts=ints(starts),
        context_lengths=ints([row.end for row in rows] + [0] * num_padding_rows),
        block_tables=ints(tables),
        max_row_tokens=max_row_tokens or max(sizes),
    )


class PaddedGPULayers:
    """Each microbatch is padded at random, with NaN. Fresh KV blocks hold NaN too."""

    def __init__(
        self, stage: GPTJStage, dtype: torch.dtype, device: torch.device, block_size: int = BLOCK_SIZE, seed: int = 0
    ) -> None:
        stage = stage.to(device, dtype)
        blocks = [GPUBlock(block) for block in stage.h.values()]
        self.layers = GPULayers(stage.config, blocks, NUM_BLOCKS, block_size, dtype, device, num_sms=6)
        self.kernels = self.layers.kernels
        self.weight_bytes = self.layers.weight_bytes
        self.kv_cache_bytes = self.layers.kv_cache_bytes
        self._block_size = block_size
        self._device = device
        self._rng = random.Random(seed)
        for cache in (self.layers.keys, self.layers.values):
            cache.fill_(torch.nan)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self.layers.copy_blocks(copies)

    def forward(self, hidden: Tensor, rows: Sequence[PagedRow]) -> Tensor:
        padding = [self._rng.randint(0, 3) for _ in range(3)]
        described = device_rows(rows, self._block_size, NUM_BLOCKS, self._device, *padding)
        padded = torch.cat([hidden, torch.full((padding[0], hidden.shape[1]), torch.nan)]).to(self._device)
        before = padded.clone()
        out = self.layers.run(padded, described)
        assert torch.equal(padded.nan_to_num(), before.nan_to_num())
        return out[: len(hidden)].float().cpu()
