"""`GPULinear`: linear layers that share their input, as one product; weights as they are, in int8 or in fp8.

Both 8-bit kinds have a scale for each output. int8 multiplies them with inputs as they are (weight-only). fp8 (e4m3)
does so for few rows too, where reading the weights is all that counts; with more it rounds each row of inputs to fp8,
with a scale of its own, and multiplies on the fp8 of the tensor cores. On a CPU everything runs on PyTorch's kernels,
for tests and to measure what the rounding costs. Shapes: `T` rows, `K` inputs, `N` outputs of all the layers.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptj_serve.errors import ConfigError

LinearKind = Literal["native", "int8", "fp8"]

OUTPUT_MULTIPLE = 16
"""`torch._scaled_mm` wants K and N to be multiples of it on a GPU; N is padded."""

MAX_FEW_ROWS: dict[LinearKind, int] = {"int8": 256, "fp8": 16}
"""With at most so many rows our own kernel multiplies. Not tuned on a GPU yet."""

_LARGEST = {"int8": 127.0, "fp8": 448.0}
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_SMALLEST = 1e-30


class GPULinear(nn.Module):
    """[T, K] → [T, N] in the inputs' dtype: the outputs of its layers side by side, in their order."""

    weight: Tensor  # [N, K]; in 8 bits N is padded
    scale: Tensor  # [N], of 8 bits
    bias: Tensor | None  # [N]

    def __init__(self, linears: Sequence[nn.Linear], kind: LinearKind = "native") -> None:
        """Raises `ConfigError` for a width that fp8 can't have."""
        super().__init__()
        self.kind = kind
        self.width = linears[0].in_features
        self.num_outputs = sum(linear.out_features for linear in linears)
        if kind == "fp8" and self.width % OUTPUT_MULTIPLE:
            raise ConfigError(f"quantization=fp8: inputs must be a multiple of {OUTPUT_MULTIPLE}, not {self.width}")
        if kind == "native":
            weights = [linear.weight.detach() for linear in linears]
            self.register_buffer("weight", weights[0] if len(weights) == 1 else torch.cat(weights))
        else:
            self._quantize(linears, kind)
        biases = [_bias_of(linear) for linear in linears]
        has_bias = any(linear.bias is not None for linear in linears)
        self.register_buffer(
            "bias", F.pad(torch.cat(biases), (0, len(self.weight) - self.num_outputs)) if has_bias else None
        )

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "native":
            return F.linear(x, self.weight, self.bias)
        x = x.contiguous()
        if x.is_cuda and len(x) <= MAX_FEW_ROWS[self.kind]:
            from gptj_serve.kernels.gpu.linear_kernels import product

            return product(x, self.weight, self.scale, self.bias, self.num_outputs)
        return self._scaled_product(x) if self.kind == "fp8" else self._restored_product(x)

    def _quantize(self, linears: Sequence[nn.Linear], kind: LinearKind) -> None:
        like = linears[0].weight
        num_padded = -(-self.num_outputs // OUTPUT_MULTIPLE) * OUTPUT_MULTIPLE
        self.register_buffer("weight", torch.zeros(num_padded, self.width, dtype=_DTYPES[kind], device=like.device))
        self.register_buffer("scale", torch.ones(num_padded, dtype=torch.float32, device=like.device))
        first = 0
        for linear in linears:  # one by one, so that little exists twice
            end = first + linear.out_features
            self.weight[first:end], self.scale[first:end] = quantized(linear.weight.detach(), kind)
            first = end

    def _scaled_product(self, x: Tensor) -> Tensor:
        """On the fp8 cores; in bfloat16 whatever the inputs' dtype, since all products by rows have that."""
        rounded, scale = _round_rows(x)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        out = torch._scaled_mm(
            rounded,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale[None],
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return out[:, : self.num_outputs].to(x.dtype)

    def _restored_product(self, x: Tensor) -> Tensor:
        """With weights in the inputs' dtype, which exist for this product alone."""
        weight = torch.empty(self.weight.shape, dtype=x.dtype, device=x.device)
        torch.mul(self.weight, self.scale[:, None], out=weight)
        return F.linear(x, weight, self.bias)[:, : self.num_outputs]


def quantized(weight: Tensor, kind: LinearKind) -> tuple[Tensor, Tensor]:
    """[N, K] → the same in 8 bits, and the scale of each output in fp32."""
    scale = weight.abs().amax(dim=1).float() / _LARGEST[kind]
    parts = weight.float() / scale.clamp_min(_SMALLEST)[:, None]
    return (parts.round() if kind == "int8" else parts).to(_DTYPES[kind]), scale


def _round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] → fp8 [T, K], and scales [T, 1]. The scale of a row with a number that is not finite is NaN."""
    if x.is_cuda:
        from gptj_serve.kernels.gpu.linear_kernels import round_rows

        return round_rows(x)
    x = x.float()
    scale = (x.abs().amax(dim=1, keepdim=True) / _LARGEST["fp8"]).clamp_min(_SMALLEST)
    scale = scale + (x * 0).sum(dim=1, keepdim=True)
    return (x / scale).to(torch.float8_e4m3fn), scale


def _bias_of(linear: nn.Linear) -> Tensor:
    if linear.bias is not None:
        return linear.bias.detach()
    return torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)
