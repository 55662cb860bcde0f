"""`GPULayers`: the layers of a stage, with their keys and values, on kernels of our own and cuBLAS. Needs triton.

A layer is x + [attention | activated inner] @ [out_proj | fc_out]: one product inward, one outward, and between them
one kernel for all that is done to each number, and attention. The sum into the residual stream and the next LayerNorm
are one more. The stream has the model's dtype, as in transformers: a stage hands on what its next layer would read
anyway, so a cut rounds nothing. A layer rounds what it adds and then the stream, both from fp32; transformers rounds
the two products, their biases and each of the sums.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from gptj_serve.kernels.gpu.attention import Attention
from gptj_serve.kernels.gpu.inward import InwardShape, finish_inward
from gptj_serve.kernels.gpu.norm import add, add_and_norm, norm
from gptj_serve.kernels.gpu.rows import DeviceRows
from gptj_serve.kernels.gpu.tiles import capability_of, choose_tiles, num_multiprocessors
from gptj_serve.kernels.gpu.weights import GPUBlock
from gptj_serve.model.attention import copy_blocks, copy_blocks_at_once
from gptj_serve.model.block import RotaryTable
from gptj_serve.model.config import GPTJConfig


class GPULayers:
    """`run` can be captured in a graph: its kernels and their grids depend on shapes and `max_row_tokens` alone.

    Let it run once before, so that the kernels are compiled.
    """

    def __init__(
        self, config: GPTJConfig, blocks: Sequence[GPUBlock], num_kv_blocks: int, block_size: int,
        dtype: torch.dtype, device: torch.device, num_sms: int | None = None,
    ) -> None:  # fmt: skip
        """The last of `num_kv_blocks` + 1 blocks is the padding block. `num_sms`: multiprocessors to fill with work, by
        default all of the device."""
        self._config = config
        self._blocks = blocks
        self._dtype = dtype
        self._block_size = block_size
        self._num_sms = num_sms or num_multiprocessors(device)
        self._tiles = choose_tiles(capability_of(device), dtype, config.head_dim)
        self._rotary = RotaryTable(config, device)
        self._shape = InwardShape(
            config.n_head,
            config.head_dim,
            config.rotated_dim,
            config.inner_dim,
            block_size,
            config.activation_function,
        )
        # A head's tokens lie together in a block: a program reads long runs.
        shape = (len(blocks), num_kv_blocks + 1, config.n_head, block_size, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def kernels(self) -> str:
        kind = self._blocks[0].inward.kind
        return f"triton-{str(self._dtype).removeprefix('torch.') if kind == 'native' else kind}"

    @property
    def weight_bytes(self) -> int:
        return sum(block.num_bytes for block in self._blocks)

    @property
    def kv_cache_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        copy_blocks([*self.keys, *self.values], copies)

    def copy_blocks_at_once(self, sources: Tensor, targets: Tensor) -> None:
        """Both int64, on the device; the host waits for nothing."""
        copy_blocks_at_once([*self.keys, *self.values], sources, targets)

    def run(self, hidden: Tensor, rows: DeviceRows) -> Tensor:
        """Hidden states [T, D], which stay as they are → those after the last layer, in the model's dtype.

        What comes of padding tokens means nothing.
        """
        hidden = hidden.to(self._dtype).contiguous()
        # Triton launches on the current device, which another stage of this process may have set.
        with torch.cuda.device(hidden.device) if hidden.is_cuda else contextlib.nullcontext():
            return self._run(hidden, rows)

    def _run(self, hidden: Tensor, rows: DeviceRows) -> Tensor:
        config, tile = self._config, self._tiles.elements
        num_tokens, width = hidden.shape
        attention = Attention(rows, config.n_head, config.head_dim, self._block_size, self._tiles, self._num_sms)
        stream, normed = torch.empty_like(hidden), torch.empty_like(hidden)
        operands = hidden.new_empty(num_tokens, width + config.inner_dim)
        operands[:, :width].zero_()  # attention leaves padding tokens out
        addend: Tensor | None = None
        for index, block in enumerate(self._blocks):
            weight, bias, eps = block.norm_weight, block.norm_bias, config.layer_norm_epsilon
            if addend is None:
                norm(hidden, weight, bias, eps, normed, tile)
            else:
                add_and_norm(
                    hidden, addend, self._blocks[index - 1].fc_out_bias, stream, weight, bias, eps, normed, tile
                )
                hidden = stream
            inward = block.inward(normed)
            keys, values = self.keys[index], self.values[index]
            sin, cos = self._rotary.sin, self._rotary.cos
            finish_inward(inward, rows, self._shape, block.fc_in_bias, sin, cos, keys, values, operands, tile)
            attention(inward, keys, values, operands)
            addend = block.outward(operands)
        assert addend is not None, "a stage has layers"
        add(hidden, addend, self._blocks[-1].fc_out_bias, stream, tile)
        return stream
