"""LayerNorm, together with the sum into the residual stream that comes before it. Shapes: `T` tokens, `D` n_embd."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["num_tokens"])
def _add_and_norm(
    hidden, addend, addend_bias, stream, weight, bias, out, num_tokens, eps,
    WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, ADDEND_STRIDE: tl.constexpr, TOKENS: tl.constexpr,
    HAS_ADDEND: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """stream = hidden + addend + addend_bias; out = LayerNorm(stream), statistics in fp32; grid (T / TOKENS,)."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    columns = tl.arange(0, PADDED_WIDTH)[None, :]
    is_column = columns < WIDTH
    mask = (token < num_tokens) & is_column
    place = token * WIDTH + columns
    x = tl.load(hidden + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADDEND:
        x += tl.load(addend + token * ADDEND_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
        x += tl.load(addend_bias + columns, mask=is_column, other=0.0).to(tl.float32)
        # What is normalized is what the next layers add to.
        rounded = x.to(stream.dtype.element_ty)
        tl.store(stream + place, rounded, mask=mask)
        x = rounded.to(tl.float32)
    if HAS_NORM:
        mean = tl.sum(x, 1) / WIDTH
        centered = tl.where(is_column, x - mean[:, None], 0.0)
        variance = tl.sum(centered * centered, 1) / WIDTH
        normed = centered / tl.sqrt(variance + eps)[:, None]
        normed = normed * tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
        normed += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
        tl.store(out + place, normed.to(out.dtype.element_ty), mask=mask)


def norm(hidden: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, tile: int) -> None:
    """LayerNorm of hidden [T, D] into `out`, which is contiguous as it is; `tile` numbers to a program."""
    _launch(hidden, None, None, hidden, weight, bias, eps, out, tile)


def add(hidden: Tensor, addend: Tensor, addend_bias: Tensor, stream: Tensor, tile: int) -> None:
    """hidden + addend + bias [T, D], rounded once into `stream`, maybe `hidden`. The addend's rows may lie apart."""
    _launch(hidden, addend, addend_bias, stream, None, None, 0.0, None, tile)


def add_and_norm(
    hidden: Tensor, addend: Tensor, addend_bias: Tensor, stream: Tensor,
    weight: Tensor, bias: Tensor, eps: float, out: Tensor, tile: int,
) -> None:  # fmt: skip
    """`add`, and the LayerNorm of what came of it into `out`."""
    _launch(hidden, addend, addend_bias, stream, weight, bias, eps, out, tile)


def _launch(
    hidden: Tensor, addend: Tensor | None, addend_bias: Tensor | None, stream: Tensor,
    weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor | None, tile: int,
) -> None:  # fmt: skip
    num_tokens, width = hidden.shape
    padded_width = triton.next_power_of_2(width)
    tokens = max(1, tile // padded_width)
    _add_and_norm[triton.cdiv(num_tokens, tokens),](
        hidden, addend, addend_bias, stream, weight, bias, out, num_tokens, eps,
        WIDTH=width, PADDED_WIDTH=padded_width, ADDEND_STRIDE=0 if addend is None else addend.stride(0),
        TOKENS=tokens, HAS_ADDEND=addend is not None, HAS_NORM=out is not None,
        num_warps=max(1, min(16, tokens * padded_width // 512)),
    )  # fmt: skip
