"""Rotary embedding, KV write and activation, against the functions of `model.block`."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from gptj_serve.kernels.gpu.inward import ACTIVATIONS, InwardShape, finish_inward
from gptj_serve.model.attention import PagedRow
from gptj_serve.model.block import ACTIVATIONS as ALL_ACTIVATIONS
from gptj_serve.model.block import RotaryTable, rotate
from gptj_serve.model.config import Activation, GPTJConfig
from tests.kernels.gpu.device_rows import device_rows
from tests.kernels.packed import config_of

BLOCK_SIZE = 8
NUM_BLOCKS = 9
ROWS = [PagedRow(0, 11, [4, 2]), PagedRow(30, 1, [0, 8, 3, 5]), PagedRow(7, 2, [1, 7])]
NUM_TOKENS = 14


class Written:
    """What the kernel has made of an inward product, with two tokens of padding after those of ROWS."""

    def __init__(self, config: GPTJConfig, inward: Tensor, device: torch.device, tile: int = 64) -> None:
        shape = InwardShape(
            config.n_head, config.head_dim, config.rotated_dim, config.inner_dim, BLOCK_SIZE, config.activation_function
        )
        table = RotaryTable(config, device)
        cache = (NUM_BLOCKS + 1, config.n_head, BLOCK_SIZE, config.head_dim)
        self.bias = torch.randn(config.inner_dim, generator=torch.Generator().manual_seed(1)).to(inward.dtype)
        self.keys, self.values = (torch.full(cache, 77.0, dtype=inward.dtype, device=device) for _ in range(2))
        self.inward = inward.to(device, copy=True)
        width = config.n_embd + config.inner_dim
        self.operands = torch.full((len(inward), width), 77.0, dtype=inward.dtype, device=device)
        rows = device_rows(ROWS, BLOCK_SIZE, NUM_BLOCKS, device, len(inward) - NUM_TOKENS, 1)
        caches = (self.keys, self.values)
        finish_inward(
            self.inward, rows, shape, self.bias.to(device), table.sin, table.cos, *caches, self.operands, tile
        )

    def cached(self, cache: Tensor) -> Tensor:
        """What stands in the tokens' slots: [T, H, Dh]"""
        places = [
            (row.block_table[position // BLOCK_SIZE], position % BLOCK_SIZE)
            for row in ROWS
            for position in range(row.start, row.end)
        ]
        return torch.stack([cache[block, :, place] for block, place in places]).cpu()


def random_inward(config: GPTJConfig, dtype: torch.dtype) -> Tensor:
    width = 3 * config.n_embd + config.inner_dim
    return torch.randn(NUM_TOKENS + 2, width, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_heads", "head_dim", "rotary_dim", "tile"),
    [(2, 16, 4, 64), (3, 20, None, 64), (1, 256, 64, 1024), (4, 64, 64, 256), (2, 2, 2, 64)],
)
def test_q_is_rotated_and_k_and_v_are_cached(
    num_heads: int, head_dim: int, rotary_dim: int | None, tile: int, dtype: torch.dtype, device: torch.device
) -> None:
    config = config_of(n_head=num_heads, n_embd=num_heads * head_dim, rotary_dim=rotary_dim, n_inner=10)
    inward = random_inward(config, dtype)
    written = Written(config, inward, device, tile)
    q, k, v = (part.unflatten(1, (num_heads, -1)) for part in inward[:NUM_TOKENS, : 3 * config.n_embd].chunk(3, dim=1))
    positions = torch.tensor([position for row in ROWS for position in range(row.start, row.end)])
    angles = RotaryTable(config)(positions)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.016, torch.float16: 0.002}[dtype]  # a product may be fused
    close = {"atol": tolerance, "rtol": tolerance}
    rotated = written.inward[:NUM_TOKENS, : config.n_embd].cpu().unflatten(1, (num_heads, -1))
    torch.testing.assert_close(rotated, rotate(q, *angles), **close)
    torch.testing.assert_close(written.cached(written.keys), rotate(k, *angles), **close)
    assert torch.equal(written.cached(written.values), v)
    assert torch.equal(written.inward[:, config.n_embd :].cpu(), inward[:, config.n_embd :])
    num_written = (written.values[:NUM_BLOCKS, 0, :, 0] != 77).sum()
    assert num_written == NUM_TOKENS  # padding tokens have written to the padding block alone


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation(activation: Activation, device: torch.device) -> None:
    config = config_of(n_head=1, n_embd=16, n_inner=203, activation_function=activation)
    inward = random_inward(config, torch.float32)
    inward[:, 3 * 16 :] *= 8  # from the tail on the left to where it is straight
    inward[3:6, 3 * 16 :] *= 0.01
    written = Written(config, inward, device)
    expected = ALL_ACTIVATIONS[activation]((inward[:, 3 * 16 :] + written.bias).double()).float()
    torch.testing.assert_close(written.operands[:, 16:].cpu(), expected, atol=5e-6, rtol=5e-6)
    assert (written.operands[:, :16] == 77).all()


def test_there_is_no_activation_that_the_kernels_lack() -> None:
    assert set(ACTIVATIONS) == set(ALL_ACTIVATIONS)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # of NumPy
@pytest.mark.parametrize("part", [0, 1])
def test_an_overflow_of_q_or_k_is_carried_on_in_v(part: int, device: torch.device) -> None:
    """Of infinity as of what the rotation makes infinite; other heads and tokens stay as they are."""
    config = config_of(n_head=2, n_embd=32, rotary_dim=8, n_inner=8)
    inward = random_inward(config, torch.float16)
    inward[2, part * 32 + 12] = torch.inf  # not rotated: it alone
    inward[4, part * 32 + 16 : part * 32 + 24] = 60000  # rotated by 45 degrees it is more than float16 has
    written = Written(config, inward, device)
    values = written.cached(written.values)
    assert values[2].isnan().nonzero().tolist() == [[0, 12]]
    assert values[4, 1, :8].isnan().any()
    assert values[4, 0].isfinite().all()
    assert values[[0, 1, 3, *range(5, NUM_TOKENS)]].isfinite().all()
