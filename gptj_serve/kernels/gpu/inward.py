"""What stands between a layer's two products but for attention: rotary embedding, KV write, bias and activation.

All of it reads the inward product [T, 3 * D + inner], whose columns are q, k, v and the MLP's inner part, so it is one
launch. Shapes: `T` tokens, `D` n_embd, `H` heads, `Dh` head_dim, `R` rotated dimensions.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from gptj_serve.kernels.gpu.rows import DeviceRows
from gptj_serve.model.config import Activation

ACTIVATIONS: dict[Activation, int] = {
    "gelu_new": 0,
    "gelu_fast": 0,
    "gelu_pytorch_tanh": 0,
    "gelu": 1,
    "relu": 2,
    "silu": 3,
    "swish": 3,
    "quick_gelu": 4,
    "tanh": 5,
}
"""All that there are, as `_activated` numbers them."""


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """In fp32. The approximate gelu is x/2 * (1 + tanh u) = x * sigmoid(2u)."""
    if ACTIVATION == 0:
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == 1:
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 2:
        y = tl.where(x < 0, 0.0, x)  # NaN stays
    elif ACTIVATION == 3:
        y = x * tl.sigmoid(x)
    elif ACTIVATION == 4:
        y = x * tl.sigmoid(1.702 * x)
    else:
        square = x * x
        series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * 17 / 315)))  # where 1 - 2 / … cancels
        y = tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (1 + tl.exp(2 * x)))
    return y


@triton.jit
def _rotated(x, sin, cos, is_rotated, ROWS: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Interleaved pairs of x [ROWS, PADDED_DIM], in fp32; sin and cos are [ROWS, PADDED_DIM / 2]."""
    even, odd = tl.split(tl.reshape(x, (ROWS, PADDED_DIM // 2, 2)))
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    new_even = tl.where(is_rotated, even * cos - odd * sin, even)
    new_odd = tl.where(is_rotated, odd * cos + even * sin, odd)
    return tl.reshape(tl.join(new_even, new_odd), (ROWS, PADDED_DIM)).to(x.dtype)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions", "slots"])
def _finish_inward(
    inward, keys, values, operands, fc_in_bias, sin, cos, positions, slots, num_tokens,
    STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, NUM_HEADS: tl.constexpr, DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, ROTATED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, INNER: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (T * H / ROWS + T * INNER / COLUMNS,): q is rotated in place, k and v go to the cache, the activated inner
    part to the columns of `operands` after the first D."""
    width: tl.constexpr = NUM_HEADS * DIM
    num_row_tiles = tl.cdiv(num_tokens * NUM_HEADS, ROWS)
    tile = tl.program_id(0)
    if tile < num_row_tiles:
        row = tile * ROWS + tl.arange(0, ROWS)  # a head of a token
        token, head = row // NUM_HEADS, (row % NUM_HEADS)[:, None]
        is_token = token < num_tokens
        dims = tl.arange(0, PADDED_DIM)[None, :]
        mask = is_token[:, None] & (dims < DIM)
        own = token.to(tl.int64)[:, None] * STRIDE + head * DIM + dims
        q = tl.load(inward + own, mask=mask, other=0.0)
        k = tl.load(inward + width + own, mask=mask, other=0.0)
        v = tl.load(inward + 2 * width + own, mask=mask, other=0.0)
        pairs = tl.arange(0, PADDED_DIM // 2)[None, :]
        is_rotated = is_token[:, None] & (pairs < ROTATED_DIM // 2)
        position = tl.load(positions + token, mask=is_token, other=0)
        angle = position[:, None] * (ROTATED_DIM // 2) + pairs
        sin_ = tl.load(sin + angle, mask=is_rotated, other=0.0)
        cos_ = tl.load(cos + angle, mask=is_rotated, other=1.0)
        q = _rotated(q, sin_, cos_, is_rotated, ROWS, PADDED_DIM)
        k = _rotated(k, sin_, cos_, is_rotated, ROWS, PADDED_DIM)
        # An overflow may leave a score of -infinity, whose weight of 0 hides it. A value of NaN does not hide.
        is_finite = (tl.abs(q.to(tl.float32)) < float("inf")) & (tl.abs(k.to(tl.float32)) < float("inf"))
        v = tl.where(is_finite, v.to(tl.float32), float("nan")).to(v.dtype)
        tl.store(inward + own, q, mask=mask)
        slot = tl.load(slots + token, mask=is_token, other=0).to(tl.int64)[:, None]
        place = ((slot // BLOCK_SIZE * NUM_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * DIM + dims
        tl.store(keys + place, k, mask=mask)
        tl.store(values + place, v, mask=mask)
    else:
        at = (tile - num_row_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        inner_token, column = at // INNER, at % INNER
        is_inner = inner_token < num_tokens
        x = tl.load(inward + inner_token * STRIDE + 3 * width + column, mask=is_inner, other=0.0).to(tl.float32)
        x += tl.load(fc_in_bias + column, mask=is_inner, other=0.0).to(tl.float32)
        activated = _activated(x, ACTIVATION).to(operands.dtype.element_ty)
        tl.store(operands + inner_token * OUT_STRIDE + width + column, activated, mask=is_inner)


@dataclass(frozen=True, slots=True)
class InwardShape:
    num_heads: int
    head_dim: int
    rotated_dim: int
    inner_dim: int
    block_size: int
    activation: Activation


def finish_inward(
    inward: Tensor, rows: DeviceRows, shape: InwardShape, fc_in_bias: Tensor, sin: Tensor, cos: Tensor,
    keys: Tensor, values: Tensor, operands: Tensor, tile: int,
) -> None:  # fmt: skip
    """The inward product [T, 3 * D + inner], fp32 tables [positions, R / 2], one layer's keys and values
    [blocks, H, block_size, Dh] and the outward product's operands [T, D + inner], as `_finish_inward` says; `tile`
    numbers to a program."""
    padded_dim = max(16, triton.next_power_of_2(shape.head_dim))
    num_rows, num_inner = rows.num_tokens * shape.num_heads, rows.num_tokens * shape.inner_dim
    tile_rows = max(1, tile // padded_dim)
    _finish_inward[triton.cdiv(num_rows, tile_rows) + triton.cdiv(num_inner, tile),](
        inward, keys, values, operands, fc_in_bias, sin, cos, rows.positions, rows.slots, rows.num_tokens,
        STRIDE=inward.stride(0), OUT_STRIDE=operands.stride(0), NUM_HEADS=shape.num_heads, DIM=shape.head_dim,
        PADDED_DIM=padded_dim, ROTATED_DIM=shape.rotated_dim, BLOCK_SIZE=shape.block_size, INNER=shape.inner_dim,
        ACTIVATION=ACTIVATIONS[shape.activation], ROWS=tile_rows, COLUMNS=tile, num_warps=4,
    )  # fmt: skip
