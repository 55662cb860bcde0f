"""The Triton kernels of `linear`: products with 8-bit weights, and rounding rows to fp8.

Importing it needs triton. Shapes: `T` rows, `K` inputs, `N` outputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8_MAX = 448.0
"""The largest number of e4m3."""

SMALLEST = 1e-30
"""Scales are of at least this magnitude: a row of zeros stays one."""


@triton.jit(do_not_specialize=["num_rows"])  # which differs from step to step
def product_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, num_rows, num_outputs, width,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, K] times (scale [N] * weight [N, K]) transposed, + bias [N]; sums in fp32.

    The weights are the left operand: on Hopper that one comes from registers, where they are converted.
    """
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    steps = tl.arange(0, BLOCK_K)
    is_output, is_row = outputs < num_outputs, rows < num_rows
    weights = weight_ptr + outputs.to(tl.int64)[:, None] * width + steps[None, :]
    inputs = x_ptr + rows.to(tl.int64)[None, :] * width + steps[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in range(0, width, BLOCK_K):
        is_step = steps < width - start
        w = tl.load(weights + start, mask=is_output[:, None] & is_step[None, :], other=0.0)
        x = tl.load(inputs + start, mask=is_step[:, None] & is_row[None, :], other=0.0)
        sums = tl.dot(w.to(x.dtype), x, sums, input_precision="ieee")
    sums *= tl.load(scale_ptr + outputs, mask=is_output, other=0.0)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[:, None]
    places = out_ptr + rows.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    tl.store(places, sums.to(out_ptr.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])


@triton.jit
def round_rows_kernel(
    x_ptr, rounded_ptr, scale_ptr, width, FP8_MAX: tl.constexpr, SMALLEST: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Each row x [K] as rounded [K] in fp8 times a scale of its own, which makes its largest number 448.

    The scale of a row with a number that is not finite is NaN, which no maximum shows.
    """
    row = tl.program_id(0).to(tl.int64)
    steps = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row * width + steps, mask=steps < width, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / FP8_MAX, SMALLEST) + tl.sum(x * 0.0, axis=0)
    rounded = (x / scale).to(rounded_ptr.dtype.element_ty)
    tl.store(rounded_ptr + row * width + steps, rounded, mask=steps < width)
    tl.store(scale_ptr + row, scale)


def product_blocks(num_rows: int, num_outputs: int) -> dict[str, int]:
    """How a product is cut up. With few outputs in small parts, so that each multiprocessor has one."""
    block_t = min(64, max(16, triton.next_power_of_2(num_rows)))
    return {
        "BLOCK_T": block_t,
        "BLOCK_N": 32 if num_outputs <= 8192 else 64,
        "BLOCK_K": 256 if block_t == 16 else 128,
    }


def num_product_stages(dtype: torch.dtype) -> int:
    """How many parts of inputs and weights are on their way: with more, fp32 would not fit into 99 KiB."""
    return 2 if dtype == torch.float32 else 4


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    """x [T, K], contiguous; weight [at least N, K] in int8 or fp8, scale [at least N] in fp32 → [T, N] like x."""
    num_rows, width = x.shape
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    blocks = product_blocks(num_rows, num_outputs)
    grid = (triton.cdiv(num_outputs, blocks["BLOCK_N"]), triton.cdiv(num_rows, blocks["BLOCK_T"]))
    launch: Any = product_kernel[grid]
    launch(
        x, weight, scale, scale if bias is None else bias, out, num_rows, num_outputs, width,
        HAS_BIAS=bias is not None, **blocks, num_warps=4, num_stages=num_product_stages(x.dtype),
    )  # fmt: skip
    return out


def num_warps_of_a_row(width: int) -> int:
    """So many that a thread has at most 64 of its numbers."""
    return min(16, max(4, (1 << (width - 1).bit_length()) // 2048))


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K], contiguous → fp8 [T, K], and scales [T, 1] in fp32."""
    num_rows, width = x.shape
    rounded = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(num_rows, 1, dtype=torch.float32, device=x.device)
    launch: Any = round_rows_kernel[(num_rows,)]
    launch(
        x, rounded, scale, width, FP8_MAX=FP8_MAX, SMALLEST=SMALLEST,
        BLOCK_K=triton.next_power_of_2(width), num_warps=num_warps_of_a_row(width),
    )  # fmt: skip
    return rounded, scale
