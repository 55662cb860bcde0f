"""The block's parts against the functions of transformers that they must equal."""

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions

from gptj_serve.model.block import ACTIVATIONS, RotaryTable, rotate
from gptj_serve.model.config import GPTJConfig


@pytest.mark.parametrize("rotary_dim", [2, 4, 6, 8, None])
def test_rotary_turns_interleaved_pairs_as_transformers_does(rotary_dim: int | None):
    config = GPTJConfig(n_embd=32, n_head=4, rotary_dim=rotary_dim, n_positions=50)
    width = config.rotated_dim
    positions = torch.tensor([0, 1, 2, 17, 49, 3])
    x = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))  # [T, H, Dh]
    sin, cos = create_sinusoidal_positions(50, width)[positions].chunk(2, dim=-1)
    turned = apply_rotary_pos_emb(x[None, ..., :width], sin[None], cos[None])[0]
    expected = torch.cat([turned, x[..., width:]], dim=-1)
    torch.testing.assert_close(rotate(x, *RotaryTable(config)(positions)), expected, atol=1e-6, rtol=1e-6)


def test_rotation_mixes_neighbours_and_not_halves():
    sin, cos = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])  # a quarter turn of pair 0, none of pair 1
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    assert rotate(x, sin, cos).tolist() == [[-2.0, 1.0, 3.0, 4.0, 5.0]]


def test_rotary_table_stays_exact_when_positions_are_large():
    table = RotaryTable(GPTJConfig())
    expected = create_sinusoidal_positions(2048, 64)
    torch.testing.assert_close(torch.cat([table.sin, table.cos], dim=-1), expected, atol=2e-4, rtol=0)
    exact = 2047.0 / 10000 ** (2 / 64)
    assert abs(table.sin[2047, 1].item() - torch.tensor(exact, dtype=torch.float64).sin().item()) < 2e-4


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation(name: str):
    x = torch.linspace(-6, 6, 241)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), atol=2e-6, rtol=1e-6)
