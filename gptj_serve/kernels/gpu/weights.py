"""`GPUBlock`: a layer's weights as `GPULayers` multiplies with them, and the seam for products in fewer bits."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from gptj_serve.model.block import GPTJBlock


class Linear(Protocol):
    """A product with a weight [N, K]. Its biases are the kernels' business."""

    @property
    def kind(self) -> str:
        """ "native", or what the weights are rounded to, as in "int8"."""

    @property
    def num_bytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] → [T, N] in the dtype of x, rows contiguous, and nobody else's: it may be written to.

        No synchronisation; what it allocates depends on T alone.
        """


class NativeLinear:
    """cuBLAS, with the weights as they are."""

    kind = "native"

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        weights = [linear.weight.detach() for linear in linears]
        self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)  # [N, K]

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x, self._weight.t())


MakeLinear = Callable[[Sequence[nn.Linear]], Linear]
"""From linear layers without biases that share their input; their outputs then stand side by side."""


class GPUBlock:
    """Made of one block after the other while a stage loads, so that only one layer exists twice."""

    def __init__(self, block: GPTJBlock, make_linear: MakeLinear = NativeLinear) -> None:
        attn, mlp = block.attn, block.mlp
        inward = (attn.q_proj, attn.k_proj, attn.v_proj, mlp.fc_in)
        self.inward = make_linear([_linear(linear.weight) for linear in inward])
        # the sum of two products is one product of what stands side by side
        self.outward = make_linear([_linear(torch.cat([attn.out_proj.weight, mlp.fc_out.weight], dim=1))])
        self.norm_weight, self.norm_bias = block.ln_1.weight.detach().clone(), block.ln_1.bias.detach().clone()
        self.fc_in_bias, self.fc_out_bias = mlp.fc_in.bias.detach().clone(), mlp.fc_out.bias.detach().clone()

    @property
    def num_bytes(self) -> int:
        vectors = (self.norm_weight, self.norm_bias, self.fc_in_bias, self.fc_out_bias)
        return self.inward.num_bytes + self.outward.num_bytes + sum(vector.nbytes for vector in vectors)


def _linear(weight: Tensor) -> nn.Linear:
    """With this weight [N, K], and no other memory."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear
