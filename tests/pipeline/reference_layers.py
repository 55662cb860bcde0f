"""`ReferenceLayers`: what `GPULayers` do, in plain torch over the blocks of a `GPTJStage`.

Shapes: `T` packed tokens, `R` rows, `C` slots of a block table's blocks, `H` heads, `Dh` head_dim.
"""

import torch
from torch import Tensor

from gptj_serve.kernels.gpu.rows import DeviceRows
from gptj_serve.model.attention import copy_blocks_at_once
from gptj_serve.model.stage import GPTJStage


class ReferenceLayers:
    kernels = "reference"
    weight_bytes = 0

    def __init__(self, stage: GPTJStage, num_kv_blocks: int, block_size: int) -> None:
        self._stage = stage
        config = stage.config
        shape = (len(stage.span), num_kv_blocks + 1, block_size, config.n_head, config.head_dim)
        # Of whoever had the blocks before. Nothing of it may be seen.
        self.keys, self.values = torch.full(shape, torch.nan), torch.full(shape, torch.nan)

    @property
    def kv_cache_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy_blocks_at_once(self, sources: Tensor, targets: Tensor) -> None:
        copy_blocks_at_once([*self.keys, *self.values], sources, targets)

    def run(self, hidden: Tensor, rows: DeviceRows) -> Tensor:
        rotary = self._stage.rotary(rows.positions)
        for index, block in enumerate(self._stage.h.values()):
            hidden = block(hidden, rotary, lambda q, k, v, at=index: self._attend(at, q, k, v, rows))
        return hidden

    def _attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, rows: DeviceRows) -> Tensor:
        keys, values = self.keys[index], self.values[index]
        keys.view(-1, *k.shape[1:])[rows.slots.long()] = k
        values.view(-1, *v.shape[1:])[rows.slots.long()] = v
        row_of_token = (torch.arange(rows.num_tokens)[:, None] >= rows.row_starts[None, 1:]).sum(-1)  # R: of none
        tables = rows.block_tables[row_of_token.clamp(max=rows.num_rows - 1)]  # [T, blocks]
        contexts, seen = keys[tables].flatten(1, 2), values[tables].flatten(1, 2)  # [T, C, H, Dh]
        visible = torch.arange(contexts.shape[1]) <= rows.positions[:, None]  # [T, C]
        scores = torch.einsum("thd,tchd->thc", q, contexts) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        return torch.einsum("thc,tchd->thd", weights, seen.masked_fill(~visible[:, :, None, None], 0.0))
