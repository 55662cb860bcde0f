"""A stage whose results for a token depend on the tokens before it in its sequence, and on nothing else, bit for bit.

What could let a row's batch show through, and what is done about it:

- matrix products: oneDNN's, with numbers of rows that were tried to agree (`bit_equality`);
- activations: torch's kernels compute the last elements of a tensor, or of a thread's share, with other instructions
  than the rest; so they are fused into oneDNN's products, whose kernels mask what is over;
- attention: `deterministic_attention`;
- LayerNorm and the embedding work row by row; sums, products, exp and tanh of single elements have the same bits
  wherever an element stands. tests/model/test_deterministic.py holds torch to all of it.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gptj_serve.errors import ConfigError
from gptj_serve.model.attention import AttentionPlan
from gptj_serve.model.bit_equality import REFERENCE, agreeing_num_rows
from gptj_serve.model.block import GPTJBlock
from gptj_serve.model.config import Activation
from gptj_serve.model.deterministic_attention import TiledAttention
from gptj_serve.model.stage import GPTJStage

DTYPES = (torch.float32, torch.bfloat16)


class Fused(NamedTuple):
    """What oneDNN applies to a product before it is rounded: torch's names for it."""

    operation: str = "none"
    algorithm: str = ""


_GELU_TANH = Fused("gelu", "tanh")
FUSED: dict[Activation, Fused] = {
    "gelu": Fused("gelu", "none"),
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "relu": Fused("relu"),
    "silu": Fused("swish"),
    "swish": Fused("swish"),
    "tanh": Fused("tanh"),
}
"""All of `block.ACTIVATIONS` but quick_gelu, which oneDNN has and torch doesn't pass on."""


class DeterministicLinear(nn.Module):
    """An `nn.Linear` (and an activation), any row of whose output has the same bits whatever other rows there are.

    The weight is kept in oneDNN's own layout, which only this class can use. `num_rows` are those that agree: others
    are padded or cut.
    """

    num_rows: tuple[int, ...] = (REFERENCE,)

    def __init__(self, linear: nn.Linear, fused: Fused) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), REFERENCE)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        self.in_features = linear.in_features
        self._fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]"""
        if x.dim() != 2:
            return self.forward(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)
        if len(x) <= self.num_rows[-1]:
            return self._part(x)
        return torch.cat([self._part(part) for part in torch.split(x, self.num_rows[-1])])

    def product(self, rows: Tensor) -> Tensor:
        """With as many rows as there are, agreeing or not."""
        operation, algorithm = self._fused
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, self.weight, self.bias, operation, [], algorithm)
        return out

    def _part(self, rows: Tensor) -> Tensor:
        num_missing = self.num_rows[bisect_left(self.num_rows, len(rows))] - len(rows)
        if num_missing == 0:
            return self.product(rows)
        return self.product(torch.cat([rows, rows[-1:].expand(num_missing, -1)]))[: len(rows)]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x) without torch's sigmoid, which isn't the same everywhere in a tensor."""
    wide = x.float()
    return (wide / (1 + torch.exp(-1.702 * wide))).to(x.dtype)


class Conversion:
    """Makes linear layers deterministic; what the machine does for one shape is tried once."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        if device.type != "cpu" or dtype not in DTYPES:
            raise ConfigError(f"deterministic: stages on CPU in float32 or bfloat16 only, not {dtype} on {device}")
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            raise ConfigError("deterministic: this build of torch lacks oneDNN, whose matrix products it needs")
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise ConfigError("deterministic: oneDNN has no bfloat16 products for this CPU; use float32")
        self._dtype = dtype
        self._agreeing: dict[tuple[int, int, bool, Fused], tuple[int, ...]] = {}

    def linear(self, linear: nn.Linear, fused: Fused = Fused()) -> DeterministicLinear:  # noqa: B008  # immutable
        converted = DeterministicLinear(linear, fused)
        shape = (linear.in_features, linear.out_features, linear.bias is None, fused)
        if shape not in self._agreeing:
            what = f"a product with a {linear.in_features} x {linear.out_features} matrix in {self._dtype}"
            self._agreeing[shape] = agreeing_num_rows([converted.product], linear.in_features, self._dtype, what)
        converted.num_rows = self._agreeing[shape]
        return converted


def make_deterministic(stage: GPTJStage) -> tuple[AttentionPlan, Callable[[nn.Linear], nn.Module]]:
    """Replace the stage's linear layers, one by one; returns how its rows are to attend, and what converts a head that
    isn't the stage's own.

    Raises `ConfigError` where it can't be done: on a GPU, in another dtype, or when the machine's kernels turn out to
    give other bits to a row in another place.
    """
    weight = next(stage.parameters())
    conversion = Conversion(weight.dtype, weight.device)
    plan = TiledAttention(stage.config.head_dim)
    activation = stage.config.activation_function
    for name in [name for name, module in stage.named_modules() if isinstance(module, nn.Linear)]:
        linear = stage.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        fused = FUSED.get(activation, Fused()) if name.endswith(".mlp.fc_in") else Fused()
        stage.set_submodule(name, conversion.linear(linear, fused))
    for block in stage.h.values():
        assert isinstance(block, GPTJBlock)
        block.mlp.activation = _as_it_is if activation in FUSED else quick_gelu
    return plan, conversion.linear


def _as_it_is(x: Tensor) -> Tensor:
    return x
