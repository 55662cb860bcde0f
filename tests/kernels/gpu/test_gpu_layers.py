"""`GPULayers` against PyTorch's layers, in microbatches of all shapes with padding and fresh blocks full of NaN."""

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from gptj_serve.model.attention import PagedRow
from gptj_serve.model.config import GPTJConfig
from tests.kernels.gpu.device_rows import PaddedGPULayers, device_rows
from tests.kernels.packed import (
    NUM_BLOCKS,
    Inputs,
    alone,
    config_of,
    random_schedule,
    random_sequences,
    random_stage,
    reference,
    run,
)

CONFIGS = [
    config_of(n_head=2, n_embd=64, rotary_dim=8),
    config_of(n_head=3, n_embd=3 * 20, rotary_dim=20, n_inner=50, activation_function="quick_gelu"),
    config_of(n_head=1, n_embd=256, rotary_dim=64, n_layer=1, activation_function="gelu"),
    config_of(n_head=5, n_embd=5 * 16, rotary_dim=None, n_layer=3, n_inner=1100, layer_norm_epsilon=1e-3),
]


def largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Relative to the largest number that is expected."""
    ours, theirs = torch.cat(actual), torch.cat(expected)
    assert ours.shape == theirs.shape
    assert theirs.isfinite().all()
    return ((ours - theirs).abs().max() / theirs.abs().max()).nan_to_num(torch.inf).item()


def random_run(
    config: GPTJConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """(ours, those of PyTorch's layers in fp32 with the same weights)"""
    rng = random.Random(seed)
    stage = random_stage(config, seed=seed)
    sequences = random_sequences(config, [rng.randint(1, 40) for _ in range(3)], rng)
    expected = alone([reference(stage)], sequences)
    layers = PaddedGPULayers(random_stage(config, seed=seed), dtype, device, seed=seed)
    return run([layers], sequences, random_schedule(sequences, rng), seed, fill_with_nan=False), expected


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.n_head}x{config.head_dim}")
def test_float32_is_pytorch_s(config: GPTJConfig, device: torch.device) -> None:
    """Only the order of sums differs."""
    for seed in range(2):
        assert largest_error(*random_run(config, torch.float32, device, seed)) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_differs_by_its_rounding(dtype: torch.dtype, bound: float, device: torch.device) -> None:
    for seed in range(2):
        assert 0 < largest_error(*random_run(CONFIGS[seed], dtype, device, seed)) < bound


def test_copied_and_shared_blocks(device: torch.device) -> None:
    """A second sequence goes on from the first one's block, copied, and reads one that is filled beside it."""
    config = CONFIGS[0]
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(40, 64, generator=generator)
    second = torch.cat([first[:21], torch.randn(10, 64, generator=generator)])
    third = torch.cat([first[:32], torch.randn(4, 64, generator=generator)])
    sequences = [Inputs(first), Inputs(second, parent=0, num_shared=21), Inputs(third, parent=0, num_shared=32)]
    schedule = [[(0, 30)], [(1, 3), (0, 2), (2, 2)], [(0, 8), (1, 7), (2, 1)], [(2, 1)]]
    layers = PaddedGPULayers(random_stage(config), torch.float32, device)
    ours = run([layers], sequences, schedule, fill_with_nan=False)
    assert largest_error(ours, alone([reference(random_stage(config))], sequences)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cut_between_stages_rounds_nothing(dtype: torch.dtype, device: torch.device) -> None:
    config = CONFIGS[3]
    hidden = torch.randn(20, config.n_embd, generator=torch.Generator().manual_seed(1))
    whole, *parts = (
        PaddedGPULayers(random_stage(config, span), dtype, device) for span in (range(3), range(1), range(1, 3))
    )
    rows = [PagedRow(0, 18, [3, 4]), PagedRow(0, 2, [7])]
    cut = hidden
    for part in parts:
        cut = part.forward(cut.to(dtype), rows)
    assert torch.equal(whole.forward(hidden.to(dtype), rows), cut)


def test_padding_writes_to_the_padding_block_alone(device: torch.device) -> None:
    layers = PaddedGPULayers(random_stage(CONFIGS[0]), torch.float32, device).layers
    for cache in (layers.keys, layers.values):
        cache.fill_(77)
    rows = device_rows([PagedRow(0, 3, [5])], 16, NUM_BLOCKS, device, 4, 2, 1)
    hidden = torch.full((7, 64), torch.nan, device=device)
    hidden[:3] = 1
    assert layers.run(hidden, rows)[:3].isfinite().all()
    for cache in (layers.keys, layers.values):
        assert (cache[:, [*range(5), *range(6, NUM_BLOCKS)]] == 77).all()
        assert (cache[:, 5, :, 3:] == 77).all()
        assert cache[:, 5, :, :3].isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # of NumPy
@pytest.mark.parametrize("layer_name", ["q_proj", "k_proj"])
def test_an_overflow_is_seen_in_its_own_row(layer_name: str, device: torch.device) -> None:
    """In float16, whose infinite scores softmax would turn into weights of 0."""
    stage = random_stage(CONFIGS[0])
    getattr(stage.h["1"].attn, layer_name).weight *= -4e4
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    hidden[5:] = 0  # LayerNorm leaves its bias: as small as need be
    stage.h["0"].ln_1.bias.zero_()
    stage.h["1"].ln_1.bias.zero_()
    for name in ("attn.out_proj.weight", "mlp.fc_out.weight", "mlp.fc_out.bias"):
        stage.h["0"].get_parameter(name).zero_()
    layers = PaddedGPULayers(stage, torch.float16, device)
    out = layers.forward(hidden.half(), [PagedRow(0, 5, [1]), PagedRow(0, 4, [2])])
    assert out[:5].isnan().any(dim=1).all()
    assert out[5:].isfinite().all()


def test_what_it_holds(device: torch.device) -> None:
    config = CONFIGS[0]
    layers = PaddedGPULayers(random_stage(config), torch.bfloat16, device)
    block = sum(parameter.numel() for parameter in random_stage(config).h["0"].parameters())
    assert layers.kernels == "triton-bfloat16"
    assert layers.weight_bytes == 2 * config.n_layer * block
    assert layers.kv_cache_bytes == 2 * 2 * config.n_layer * (NUM_BLOCKS + 1) * 16 * config.n_embd
    assert layers.layers.keys.nbytes + layers.layers.values.nbytes == layers.kv_cache_bytes
