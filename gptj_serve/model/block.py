"""One GPT-J layer, written once.

A block does not know whether its tokens are packed or padded, nor where keys and values are kept: it hands the
rotated q, k and v to the attention function that it is given. Shapes: `...` the token dimensions (`T` when packed,
`B, T` when padded), `D` n_embd, `H` heads, `Dh` head_dim, `R` rotated dimensions.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptj_serve.model.config import Activation, GPTJConfig

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v), each [..., H, Dh] and already rotated → attended values [..., H, Dh]."""

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class RotaryTable(nn.Module):
    """Sines and cosines of every position, in fp32 whatever the model's dtype.

    Angle of pair i at position p: p / 10000^(2i/R) (RoFormer, arXiv 2104.09864, as in transformers'
    `create_sinusoidal_positions`).
    """

    sin: Tensor  # [n_positions, R/2]
    cos: Tensor  # [n_positions, R/2]

    def __init__(self, config: GPTJConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        inverse_frequency = 10000.0 ** -(torch.arange(0, config.rotated_dim, 2).float() / config.rotated_dim)
        angles = torch.outer(torch.arange(config.n_positions).float(), inverse_frequency)
        self.register_buffer("sin", angles.sin().to(device), persistent=False)
        self.register_buffer("cos", angles.cos().to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a module to another device, never to another dtype."""
        device = fn(torch.empty(0, device=self.sin.device)).device
        self.sin, self.cos = self.sin.to(device), self.cos.to(device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [...] → (sin, cos), each [..., 1, R/2]: one row for all heads of a token."""
        return self.sin[positions].unsqueeze(-2), self.cos[positions].unsqueeze(-2)


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate the interleaved pairs (0,1), (2,3), … of the first R dimensions of x [..., H, Dh]; the rest passes."""
    rotated_dim = 2 * sin.shape[-1]
    even = x[..., 0:rotated_dim:2].float()
    odd = x[..., 1:rotated_dim:2].float()
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((pairs.flatten(-2).to(x.dtype), x[..., rotated_dim:]), dim=-1)


class GPTJAttention(nn.Module):
    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.num_heads = config.n_head
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.resid_pdrop = config.resid_pdrop

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention: AttentionFn) -> Tensor:
        heads = (self.num_heads, -1)
        q = rotate(self.q_proj(x).unflatten(-1, heads), *rotary)  # [..., H, Dh]
        k = rotate(self.k_proj(x).unflatten(-1, heads), *rotary)
        v = self.v_proj(x).unflatten(-1, heads)
        out: Tensor = self.out_proj(attention(q, k, v).flatten(-2))
        return F.dropout(out, self.resid_pdrop) if self.training else out


class GPTJMLP(nn.Module):
    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.fc_in = nn.Linear(config.n_embd, config.inner_dim)
        self.fc_out = nn.Linear(config.inner_dim, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]
        self.resid_pdrop = config.resid_pdrop

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc_out(self.activation(self.fc_in(x)))
        return F.dropout(out, self.resid_pdrop) if self.training else out


class GPTJBlock(nn.Module):
    """x + attn(ln_1 x) + mlp(ln_1 x): one LayerNorm, attention and MLP in parallel (transformers' `GPTJBlock`)."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPTJAttention(config)
        self.mlp = GPTJMLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention: AttentionFn) -> Tensor:
        normed = self.ln_1(x)
        out: Tensor = self.attn(normed, rotary, attention) + self.mlp(normed) + x  # summed in transformers' order
        return out
