"""`PackedWeight`: a linear layer's weight as cpu.cpp wants it, and `PackedLinear`, a module that multiplies with one.

int8: weights per output channel, symmetric, with a scale of 1/127 of the largest; activations per token when they
come, unsigned with a zero point (in cpu.cpp). Products are exact in int32, so all error is in the rounding of both.
"""

from collections.abc import Sequence
from ctypes import byref
from enum import IntEnum

import torch
from torch import Tensor, nn

from gptj_serve.kernels.cpu_library import Weight, cpu_library
from gptj_serve.kernels.huge_pages import zeros

PANEL = 32
"""Outputs that lie together; of cpu.cpp."""

PANELS_AT_A_TIME = 16

STEP = 4
"""Groups of 4 bytes of which a row has a multiple; of cpu.cpp."""


class OperandType(IntEnum):
    """Of weights, and of what they are multiplied with. Values are those of cpu.cpp."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2

    @property
    def num_elements(self) -> int:
        """In 4 bytes."""
        return (1, 2, 4)[self]


class PackedWeight:
    """Weights [N, K] of one or several layers that share their input, each padded to whole panels, stacked."""

    def __init__(self, linears: Sequence[nn.Linear], operand_type: OperandType) -> None:
        self.width = linears[0].in_features
        elements = operand_type.num_elements
        num_units = -(-self.width // (STEP * elements)) * STEP
        self.num_outputs = sum(_padded(linear.out_features) for linear in linears)
        dtype = (torch.float32, torch.bfloat16, torch.int8)[operand_type]
        self.panels = zeros((self.num_outputs // PANEL, num_units, PANEL, elements), dtype)
        self.scale = torch.zeros(self.num_outputs) if operand_type is OperandType.INT8 else None
        self.sum = torch.zeros(self.num_outputs, dtype=torch.int32) if operand_type is OperandType.INT8 else None
        has_bias = any(linear.bias is not None for linear in linears)
        self.bias = torch.zeros(self.num_outputs) if has_bias else None
        first = 0
        for linear in linears:
            self._fill(first, linear.weight.detach())
            if self.bias is not None and linear.bias is not None:
                self.bias[first : first + linear.out_features] = linear.bias.detach()
            first += _padded(linear.out_features)
        pointers = [None if part is None else part.data_ptr() for part in (self.scale, self.sum, self.bias)]
        self.struct = Weight(operand_type, self.num_outputs, self.width, self.panels.data_ptr(), *pointers)

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (self.panels, self.scale, self.sum, self.bias) if part is not None)

    def _fill(self, first: int, weight: Tensor) -> None:
        """Some panels at a time, so that little exists twice."""
        for start in range(0, len(weight), PANELS_AT_A_TIME * PANEL):
            part = weight[start : start + PANELS_AT_A_TIME * PANEL]
            columns = slice(first + start, first + start + len(part))
            if self.scale is not None and self.sum is not None:
                part, self.scale[columns] = _quantized(part.float())
                self.sum[columns] = part.sum(dim=1, dtype=torch.int32)
            num_panels, num_units, elements = _padded(len(part)) // PANEL, *self.panels.shape[1::2]
            rows = torch.zeros(num_panels * PANEL, num_units * elements, dtype=self.panels.dtype)
            rows[: len(part), : self.width] = part
            units = rows.view(torch.int32).view(num_panels, PANEL, num_units).transpose(1, 2)
            at = (first + start) // PANEL
            self.panels.view(torch.int32)[at : at + num_panels] = units.unsqueeze(-1)


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] → int8 [N, K], and the scale of each output."""
    scale = weight.abs().amax(dim=1) / 127
    return (weight / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8), scale


class PackedLinear(nn.Module):
    """An `nn.Linear` on a CPU; its outputs are fp32. A row of them doesn't depend on the others, in any bit."""

    def __init__(self, linear: nn.Linear, operand_type: OperandType) -> None:
        super().__init__()
        self._packed = PackedWeight([linear], operand_type)
        self._num_outputs = linear.out_features
        self._library = cpu_library()

    @property
    def num_bytes(self) -> int:
        return self._packed.num_bytes

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]"""
        rows = x.float().reshape(-1, self._packed.width).contiguous()
        out = torch.empty(len(rows), self._packed.num_outputs)
        self._library.gptj_linear(
            byref(self._packed.struct), rows.data_ptr(), len(rows), out.data_ptr(), torch.get_num_threads()
        )
        return out[:, : self._num_outputs].view(*x.shape[:-1], self._num_outputs)


def _padded(num_outputs: int) -> int:
    return -(-num_outputs // PANEL) * PANEL
