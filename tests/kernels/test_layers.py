"""The layers on our kernels against PyTorch's, for models and microbatches of all shapes; int8 against what its
rounding, and nothing else, makes of it."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gptj_serve.kernels.cpu_layers import ACTIVATIONS, BLOCK_SIZE
from gptj_serve.kernels.weights import OperandType, PackedLinear
from gptj_serve.model.block import ACTIVATIONS as ALL_ACTIVATIONS
from gptj_serve.model.block import rotate
from gptj_serve.model.config import GPTJConfig
from gptj_serve.model.stage import GPTJStage
from tests.kernels.packed import (
    N_POSITIONS,
    Inputs,
    alone,
    config_of,
    packed,
    random_schedule,
    random_sequences,
    random_stage,
    reference,
    run,
)


@st.composite
def configs(draw: st.DrawFn) -> GPTJConfig:
    """Sizes that are no multiple of anything, among others."""
    head_dim = draw(st.sampled_from([2, 4, 6, 10, 16, 18, 30, 32, 34, 50, 64, 66, 80, 100, 130]))
    n_head = draw(
        st.integers(-(-12 // head_dim), 5 if head_dim > 2 else 9)
    )  # LayerNorm magnifies errors of few numbers
    return config_of(
        n_head=n_head,
        n_embd=n_head * head_dim,
        n_layer=draw(st.integers(1, 3)),
        rotary_dim=draw(st.sampled_from([None, 2, head_dim, head_dim // 4 * 2 or 2])),
        n_inner=draw(st.none() | st.integers(1, 200)),
        activation_function=draw(st.sampled_from(sorted(ACTIVATIONS))),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
    )


def lengths() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 100), min_size=1, max_size=5)


def largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Relative to the largest number that is expected."""
    ours, theirs = torch.cat(actual), torch.cat(expected)
    assert ours.shape == theirs.shape
    assert theirs.isfinite().all()
    return ((ours - theirs).abs().max() / theirs.abs().max()).nan_to_num(torch.inf).item()


@given(configs(), lengths(), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_float32_is_pytorch_s(config: GPTJConfig, lengths: list[int], seed: int) -> None:
    """Only the order of sums differs."""
    rng = random.Random(seed)
    stage = random_stage(config, seed=seed)
    sequences = random_sequences(config, lengths, rng)
    ours = run([packed(stage, OperandType.FLOAT32)], sequences, random_schedule(sequences, rng), seed)
    assert largest_error(ours, alone([reference(stage)], sequences)) < 1e-5


@given(configs(), lengths(), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_bfloat16_differs_by_its_rounding(config: GPTJConfig, lengths: list[int], seed: int) -> None:
    """Operands, keys and values have 8 bits: each is off by up to 0.4 %, and so are sums of them by less."""
    rng = random.Random(seed)
    stage = random_stage(config, seed=seed)
    sequences = random_sequences(config, lengths, rng)
    layers = packed(stage, OperandType.BFLOAT16, torch.bfloat16)
    ours = run([layers], sequences, random_schedule(sequences, rng), seed)
    assert 0 < largest_error(ours, alone([reference(stage)], sequences)) < 0.03


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation(activation: str) -> None:
    config = config_of(n_embd=48, n_head=3, n_inner=70, activation_function=activation)
    stage = random_stage(config)
    for block in stage.h.values():  # from the tail on the left to where it is straight
        block.mlp.fc_in.weight *= 8
    sequences = [Inputs(torch.randn(40, 48, generator=torch.Generator().manual_seed(1)))]
    ours, theirs = (alone([layers], sequences) for layers in (packed(stage, OperandType.FLOAT32), reference(stage)))
    assert largest_error(ours, theirs) < 1e-5


def test_the_longest_context_with_a_wide_head() -> None:
    config = config_of(n_embd=256, n_head=1, rotary_dim=64, n_layer=1)
    stage, generator = random_stage(config), torch.Generator().manual_seed(1)
    sequences = [Inputs(torch.randn(n, 256, generator=generator)) for n in (N_POSITIONS, 200)]
    schedule = [[(0, 300)], [(1, 190), (0, 1)], *([(0, 1), (1, 1)] for _ in range(10)), [(0, N_POSITIONS - 311)]]
    ours = run([packed(stage, OperandType.FLOAT32)], sequences, schedule)
    assert largest_error(ours, alone([reference(stage)], sequences)) < 1e-5


def test_a_copied_block_is_another_block() -> None:
    """Two sequences go on from the same five tokens, in blocks of their own."""
    config = config_of(n_embd=32, n_head=2)
    stage, generator = random_stage(config), torch.Generator().manual_seed(1)
    first = torch.randn(40, 32, generator=generator)
    second = torch.cat([first[:21], torch.randn(10, 32, generator=generator)])
    sequences = [Inputs(first), Inputs(second, parent=0, num_shared=21)]
    schedule = [[(0, 30)], [(1, 3), (0, 2)], [(0, 8), (1, 7)]]
    ours = run([packed(stage, OperandType.FLOAT32)], sequences, schedule)
    assert largest_error(ours, alone([reference(stage)], sequences)) < 1e-5


def test_a_row_reads_what_another_of_its_microbatch_writes() -> None:
    """In whichever order they stand."""
    config = config_of(n_embd=32, n_head=2)
    stage, generator = random_stage(config), torch.Generator().manual_seed(1)
    first = torch.randn(50, 32, generator=generator)
    second = torch.cat([first[: 2 * BLOCK_SIZE], torch.randn(9, 32, generator=generator)])
    sequences = [Inputs(first), Inputs(second, parent=0, num_shared=2 * BLOCK_SIZE)]
    for schedule in ([[(0, 50), (1, 9)]], [[(1, 9), (0, 50)]], [[(0, 20)], [(1, 1), (0, 12)], [(0, 18), (1, 8)]]):
        ours = run([packed(stage, OperandType.FLOAT32)], sequences, schedule)
        assert largest_error(ours, alone([reference(stage)], sequences)) < 1e-5


# ------------------------------------------------------------------------------------------------ int8


def rounded_weight(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """[N, K] of -127 to 127, and the outputs' scales [N]."""
    scale = linear.weight.abs().amax(dim=1) / 127
    return (linear.weight / scale.clamp_min(1e-38)[:, None]).round(), scale


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] of 0 to 255 less the row's zero point, and the rows' scales [T], as fp32 makes them."""
    low, high = x.amin(dim=1).clamp(max=0), x.amax(dim=1).clamp(min=0)
    scale = (high - low) / 255
    inverse = torch.where(scale > 0, 1 / scale, 0)
    zero = (-low * inverse).round()
    return ((x * inverse[:, None]).round() + zero[:, None]).clamp(0, 255) - zero[:, None], scale


def rounded_product(x: Tensor, linear: nn.Linear) -> Tensor:
    """[T, K] → [T, N] in fp64: exact but for the rounding of both."""
    (rows, row_scale), (weight, weight_scale) = rounded_rows(x.float()), rounded_weight(linear)
    product = rows.double() @ weight.double().T * weight_scale.double() * row_scale.double()[:, None]
    return product if linear.bias is None else product + linear.bias.double()


def rounded_layers(stage: GPTJStage, hidden: Tensor) -> Tensor:
    """[T, D] of a whole sequence → [T, D], all but the products in fp64."""
    config, x = stage.config, hidden.double()
    sin, cos = stage.rotary(torch.arange(len(hidden)))
    for block in stage.h.values():
        norm = block.ln_1
        normed = F.layer_norm(x, (config.n_embd,), norm.weight.double(), norm.bias.double(), norm.eps)
        q, k, v = (
            rounded_product(normed, linear).view(-1, config.n_head, config.head_dim)
            for linear in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)
        )
        q, k = (rotate(part, sin, cos) for part in (q, k))
        heads_first = (part.transpose(0, 1) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(0, 1).flatten(1)
        inner = ALL_ACTIVATIONS[config.activation_function](rounded_product(normed, block.mlp.fc_in))
        x = x + rounded_product(attended, block.attn.out_proj) + rounded_product(inner, block.mlp.fc_out)
    return x


@pytest.mark.usefixtures("int8_kernels")
@pytest.mark.parametrize(
    ("width", "num_outputs"), [(1, 1), (7, 33), (64, 100), (100, 31), (130, 64), (1030, 40), (20, 2100)]
)
def test_an_int8_product_is_its_rounding_and_nothing_else(width: int, num_outputs: int) -> None:
    generator = torch.Generator().manual_seed(width)
    linear = nn.Linear(width, num_outputs).requires_grad_(False)
    linear.weight.copy_(torch.randn(num_outputs, width, generator=generator))
    x = torch.randn(23, width, generator=generator)
    x[1] = x[1].abs()  # no zero point but 0
    x[2] = -x[2].abs()
    x[3] = 0
    x[4] *= 1e6
    x[5] *= 1e-6
    x[6] += 100  # all far from 0, which has to be exact still
    linear.weight[num_outputs // 2] = 0
    torch.testing.assert_close(
        PackedLinear(linear, OperandType.INT8)(x).double(), rounded_product(x, linear), rtol=1e-6, atol=1e-6
    )


@pytest.mark.usefixtures("int8_kernels")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_layers_round_where_products_begin_and_nowhere_else(activation: str) -> None:
    """Most numbers are those of fp64 but for fp32's last bits: wherever else 8 bits got in, all would be off."""
    config = config_of(n_embd=60, n_head=3, n_inner=75, rotary_dim=6, n_layer=1, activation_function=activation)
    stage, generator = random_stage(config), torch.Generator().manual_seed(1)
    hidden = torch.randn(50, 60, generator=generator)
    (ours,) = alone([packed(stage, OperandType.INT8)], [Inputs(hidden)])
    expected = rounded_layers(stage, hidden)
    error = (ours - expected).abs() / expected.abs().max()
    assert error.median() < 1e-6
    assert error.max() < 0.02


@pytest.mark.usefixtures("int8_kernels")
@given(configs(), lengths(), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_int8_differs_by_its_rounding_in_any_microbatch(config: GPTJConfig, lengths: list[int], seed: int) -> None:
    """A number in the middle between two may be rounded to either, as its last bit in fp32 says."""
    rng = random.Random(seed)
    stage = random_stage(config, seed=seed)
    sequences = random_sequences(config, lengths, rng)
    ours = run([packed(stage, OperandType.INT8)], sequences, random_schedule(sequences, rng), seed)
    assert largest_error(ours, [rounded_layers(stage, s.hidden)[s.num_shared :] for s in sequences]) < 0.02
