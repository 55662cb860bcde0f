"""LayerNorm, together with the sum into the residual stream that comes before it. Shapes: `T` tokens, `D` n_embd."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_and_norm(
    hidden, addend, addend_bias, stream, weight, bias, out, eps,
    WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, ADDEND_STRIDE: tl.constexpr,
    HAS_ADDEND: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """stream = hidden + addend + addend_bias; out = LayerNorm(stream), statistics in fp32; grid (T,)."""
    token = tl.program_id(0).to(tl.int64)
    row = token * WIDTH
    columns = tl.arange(0, PADDED_WIDTH)
    mask = columns < WIDTH
    x = tl.load(hidden + row + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADDEND:
        x += tl.load(addend + token * ADDEND_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
        x += tl.load(addend_bias + columns, mask=mask, other=0.0).to(tl.float32)
        # What is normalized is what the next layers add to.
        rounded = x.to(stream.dtype.element_ty)
        tl.store(stream + row + columns, rounded, mask=mask)
        x = rounded.to(tl.float32)
    if HAS_NORM:
        mean = tl.sum(x, 0) / WIDTH
        centered = tl.where(mask, x - mean, 0.0)
        variance = tl.sum(centered * centered, 0) / WIDTH
        normed = centered * (1 / tl.sqrt(variance + eps))
        normed = normed * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        normed += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row + columns, normed.to(out.dtype.element_ty), mask=mask)


def norm(hidden: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    """LayerNorm of hidden [T, D] into `out`, which is contiguous as it is."""
    _launch(hidden, None, None, hidden, weight, bias, eps, out)


def add(hidden: Tensor, addend: Tensor, addend_bias: Tensor, stream: Tensor) -> None:
    """hidden + addend + bias, [T, D], rounded once, into `stream`, which may be `hidden`. Rows of addend may lie apart."""
    _launch(hidden, addend, addend_bias, stream, None, None, 0.0, None)


def add_and_norm(
    hidden: Tensor, addend: Tensor, addend_bias: Tensor, stream: Tensor,
    weight: Tensor, bias: Tensor, eps: float, out: Tensor,
) -> None:  # fmt: skip
    """`add`, and the LayerNorm of what came of it into `out`."""
    _launch(hidden, addend, addend_bias, stream, weight, bias, eps, out)


def _launch(
    hidden: Tensor, addend: Tensor | None, addend_bias: Tensor | None, stream: Tensor,
    weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor | None,
) -> None:  # fmt: skip
    num_tokens, width = hidden.shape
    padded_width = triton.next_power_of_2(width)
    _add_and_norm[num_tokens,](
        hidden, addend, addend_bias, stream, weight, bias, out, eps,
        WIDTH=width, PADDED_WIDTH=padded_width, ADDEND_STRIDE=0 if addend is None else addend.stride(0),
        HAS_ADDEND=addend is not None, HAS_NORM=out is not None,
        num_warps=max(1, min(16, padded_width // 512)),
    )  # fmt: skip
