"""`Layers`: what runs the layers of a stage and keeps their KV; `TorchLayers` does it with PyTorch's kernels."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gptj_serve.model.attention import AttentionPlan, KVCache, PagedAttention, PagedRow
from gptj_serve.model.stage import GPTJStage


class Layers(Protocol):
    @property
    def kernels(self) -> str:
        """What they run on: "torch", or ours by the type of their operands, as in "avx512-int8"."""

    @property
    def weight_bytes(self) -> int:
        """Of weights that are not parameters of the stage's module."""

    @property
    def kv_cache_bytes(self) -> int: ...

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole KV blocks (from, to) in every layer, as if one after the other."""

    def forward(self, hidden: Tensor, rows: Sequence[PagedRow]) -> Tensor:
        """Packed hidden states [T, D] of these rows → those after the last layer."""


class TorchLayers:
    """The blocks of a `GPTJStage`, called one after the other."""

    kernels = "torch"
    weight_bytes = 0

    def __init__(
        self, stage: GPTJStage, num_kv_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device,
        attention_plan: AttentionPlan | None = None,
    ) -> None:  # fmt: skip
        assert len(stage.h) == len(stage.span), "its layers were taken"
        self._stage = stage
        self._dtype = dtype
        self._attention_plan = attention_plan
        self._cache = KVCache(stage.config, len(stage.span), num_kv_blocks, block_size, dtype, device)

    @property
    def kv_cache_bytes(self) -> int:
        return self._cache.num_bytes

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self._cache.copy_blocks(copies)

    def forward(self, hidden: Tensor, rows: Sequence[PagedRow]) -> Tensor:
        attention = PagedAttention(rows, self._cache, self._attention_plan)
        return self._stage.run_layers(hidden.to(self._dtype), attention.positions, attention.layer)
