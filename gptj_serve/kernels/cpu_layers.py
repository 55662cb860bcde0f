"""`CPULayers`: the layers of a stage, with their keys and values, on our kernels."""

import ctypes
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptj_serve.kernels.cpu_library import Layer, Shape, cpu_library
from gptj_serve.kernels.huge_pages import zeros
from gptj_serve.kernels.weights import OperandType, PackedWeight
from gptj_serve.model.attention import PagedRow, copy_blocks
from gptj_serve.model.block import GPTJBlock, RotaryTable
from gptj_serve.model.config import Activation, GPTJConfig

BLOCK_SIZE = 16
"""Tokens of a KV block; of cpu.cpp."""

ACTIVATIONS: dict[Activation, int] = {
    "gelu_new": 0,
    "gelu_fast": 0,
    "gelu_pytorch_tanh": 0,
    "relu": 1,
    "silu": 2,
    "swish": 2,
    "quick_gelu": 3,
}
"""Those that cpu.cpp has."""


class PackedBlock:
    """The weights of one layer; LayerNorm, q, k, v and fc_in stand first, since they share their input."""

    def __init__(self, block: GPTJBlock, operand_type: OperandType) -> None:
        attn, mlp = block.attn, block.mlp
        self.norm_weight = block.ln_1.weight.detach().float().clone()
        self.norm_bias = block.ln_1.bias.detach().float().clone()
        self.inward = PackedWeight([attn.q_proj, attn.k_proj, attn.v_proj, mlp.fc_in], operand_type)
        self.attention_out = PackedWeight([attn.out_proj], operand_type)
        self.mlp_out = PackedWeight([mlp.fc_out], operand_type)

    @property
    def num_bytes(self) -> int:
        packed = self.inward.num_bytes + self.attention_out.num_bytes + self.mlp_out.num_bytes
        return packed + self.norm_weight.nbytes + self.norm_bias.nbytes


class CPULayers:
    """What comes of a token depends on its sequence alone, bit for bit: not on its batch, its chunk or the threads."""

    def __init__(
        self, config: GPTJConfig, blocks: Sequence[PackedBlock], num_kv_blocks: int, kv_dtype: torch.dtype
    ) -> None:
        """`kv_dtype`: float32 or bfloat16."""
        self._library = cpu_library()
        self._blocks = blocks
        self._rotary = RotaryTable(config)
        shape = (len(blocks), num_kv_blocks, config.n_head, BLOCK_SIZE * config.head_dim)
        self._keys, self._values = zeros(shape, kv_dtype), zeros(shape, kv_dtype)
        self._layers = (Layer * len(blocks))(
            *(
                Layer(
                    block.norm_weight.data_ptr(),
                    block.norm_bias.data_ptr(),
                    block.inward.struct,
                    block.attention_out.struct,
                    block.mlp_out.struct,
                    keys.data_ptr(),
                    values.data_ptr(),
                )
                for block, keys, values in zip(blocks, self._keys, self._values, strict=True)
            )
        )
        self._shape = Shape(
            config.n_embd,
            config.n_head,
            config.rotated_dim,
            config.inner_dim,
            ACTIVATIONS[config.activation_function],
            OperandType.FLOAT32 if kv_dtype == torch.float32 else OperandType.BFLOAT16,
            len(blocks),
            config.layer_norm_epsilon,
            1 / math.sqrt(config.head_dim),
            self._rotary.sin.data_ptr(),
            self._rotary.cos.data_ptr(),
            self._layers,
        )
        self._stage = ctypes.c_void_p(self._library.gptj_stage_new(self._shape))

    def __del__(self) -> None:
        if hasattr(self, "_stage"):
            self._library.gptj_stage_free(self._stage)

    @property
    def weight_bytes(self) -> int:
        return sum(block.num_bytes for block in self._blocks)

    @property
    def kv_cache_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        copy_blocks([*self._keys, *self._values], copies)

    def forward(self, hidden: Tensor, rows: Sequence[PagedRow]) -> Tensor:
        """[T, D] in any dtype → fp32, so that a cut between stages rounds nothing."""
        hidden = hidden.to(torch.float32, copy=True).contiguous()
        sizes = [(row.start, row.num_tokens, len(row.block_table)) for row in rows]
        table = np.array(sizes, dtype=np.int32)
        described = np.empty((len(rows), 4), dtype=np.int32)
        described[:, :2] = table[:, :2]
        described[0, 2:] = 0
        np.cumsum(table[:-1, 1:], axis=0, out=described[1:, 2:])
        tables = np.fromiter((block for row in rows for block in row.block_table), dtype=np.int32)
        self._check(table, tables, hidden)
        self._library.gptj_stage_forward(
            self._stage,
            hidden.data_ptr(),
            len(hidden),
            described.ctypes.data,
            len(rows),
            tables.ctypes.data,
            torch.get_num_threads(),
        )
        return hidden

    def _check(self, table: NDArray[np.int32], blocks: NDArray[np.int32], hidden: Tensor) -> None:
        """What lies outside of memory is an error here as it is in PyTorch. Raises `IndexError`."""
        starts, lengths, num_blocks = table.T
        if hidden.shape != (lengths.sum(), self._shape.width):
            raise IndexError(f"rows of {lengths.sum()} tokens for hidden states of shape {tuple(hidden.shape)}")
        ends = starts + lengths
        if starts.min() < 0 or lengths.min() < 1 or ends.max() > len(self._rotary.sin):
            raise IndexError(f"positions from {starts.min()} to {ends.max()} in a context of {len(self._rotary.sin)}")
        if (ends > num_blocks * BLOCK_SIZE).any() or blocks.min() < 0 or blocks.max() >= self._keys.shape[1]:
            raise IndexError(f"rows are not in the {self._keys.shape[1]} KV blocks")
