"""What isn't finite is seen where it comes out, and nowhere else; and what is only large is no reason for it."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gptj_serve.kernels.cpu_layers import ACTIVATIONS, BLOCK_SIZE
from gptj_serve.kernels.weights import OperandType, PackedLinear
from tests.kernels.packed import Inputs, alone, config_of, packed, random_stage, reference, run

WIDTH = 72
CONFIG = config_of(n_embd=WIDTH, n_head=3, rotary_dim=6, n_inner=100)
BAD = [torch.nan, torch.inf, -torch.inf]


def random_inputs(*lengths: int) -> list[Inputs]:
    generator = torch.Generator().manual_seed(0)
    return [Inputs(torch.randn(length, WIDTH, generator=generator)) for length in lengths]


def with_bad(inputs: Inputs, place: int, bad: float, columns: slice = slice(None)) -> Inputs:
    hidden = inputs.hidden.clone()
    hidden[place, columns] = bad
    return Inputs(hidden)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("columns", [slice(None), slice(WIDTH - 1, WIDTH)], ids=["all of it", "one number"])
def test_it_reaches_what_comes_after_it_in_its_sequence_only(
    operand_type: OperandType, bad: float, columns: slice
) -> None:
    layers = packed(random_stage(CONFIG), operand_type)
    sequences = random_inputs(40, 33, 25)
    expected = alone([layers], sequences)
    sequences[1] = with_bad(sequences[1], 9, bad, columns)
    schedules = [
        [[(0, 40), (1, 33), (2, 25)]],  # the tokens before and after it are computed together
        [[(0, 7), (1, 9), (2, 1)], [(2, 1), (1, 1), (0, 1)], [(0, 32), (1, 23), (2, 23)]],
        [[(1, 30)], *[[(0, 1), (1, 1), (2, 1)]] * 3, [(0, 37), (2, 22)]],
    ]
    for schedule in schedules:
        before, bad_one, after = run([layers], sequences, schedule)
        assert torch.equal(before, expected[0])
        assert torch.equal(after, expected[2])
        assert torch.equal(bad_one[:9], expected[1][:9])
        assert not bad_one[9:].isfinite().any()


@pytest.mark.parametrize("bad", BAD)
def test_who_takes_over_the_tokens_before_it_is_not_harmed(operand_type: OperandType, bad: float) -> None:
    """Also in the microbatch that computes both."""
    layers = packed(random_stage(CONFIG), operand_type)
    parent, other = random_inputs(BLOCK_SIZE + 10, 9)
    child = Inputs(torch.cat([parent.hidden[:BLOCK_SIZE], other.hidden]), parent=0, num_shared=BLOCK_SIZE)
    (expected,) = alone([layers], [child])
    for place in (BLOCK_SIZE, BLOCK_SIZE + 9):
        sequences = [with_bad(parent, place, bad), child]
        for schedule in ([[(0, BLOCK_SIZE + 10), (1, 9)]], [[(0, BLOCK_SIZE + 10)], [(1, 9)]]):
            poisoned, sound = run([layers], sequences, schedule)
            assert not poisoned[place:].isfinite().any()
            assert torch.equal(sound, expected)


@pytest.mark.parametrize("bad", BAD)
def test_a_product_hides_none(operand_type: OperandType, bad: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(50, 33).requires_grad_(False)
    product, x = PackedLinear(linear, operand_type), torch.randn(17, 50)
    expected = product(x)
    for column in (0, 15, 16, 47, 49):
        for row in (0, 8, 16):
            poisoned = x.clone()
            poisoned[row, column] = bad
            actual = product(poisoned)
            assert not actual[row].isfinite().any()
            others = torch.arange(17) != row
            assert torch.equal(actual[others], expected[others])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out", "ln_1"])
def test_a_weight_that_is_not_finite_is_seen(operand_type: OperandType, where: str, bad: float) -> None:
    """In all tokens: it can't be read over in silence."""
    stage = random_stage(CONFIG)
    block = stage.h["1"]
    module = next(m for name, m in block.named_modules() if name.split(".")[-1] == where)
    module.weight[3] = bad  # an output, of LayerNorm a factor
    (hidden,) = alone([packed(stage, operand_type)], random_inputs(20))
    assert not hidden.isfinite().all(dim=1).any()


# ------------------------------------------------------------------------------------------------ large numbers


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("factor", [80.0, 1e4, 1e12])
def test_activations_of_large_numbers(activation: str, factor: float) -> None:
    """Far out they are 0 or straight: as fc_out's only input, seen in every output."""
    config = config_of(n_embd=32, n_head=2, n_layer=1, n_inner=48, activation_function=activation)
    stage = random_stage(config)
    block = stage.h["0"]
    block.attn.out_proj.weight.zero_()
    block.mlp.fc_in.weight *= factor
    block.mlp.fc_in.bias.copy_(torch.linspace(-factor, factor, 48))
    sequences = [Inputs(torch.randn(30, 32, generator=torch.Generator().manual_seed(0)))]
    (ours,) = alone([packed(stage, OperandType.FLOAT32)], sequences)
    (theirs,) = alone([reference(stage)], sequences)
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x * torch.sigmoid(x),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("activation", EXACT)
def test_an_activation_number_by_number(activation: str) -> None:
    """Its tail keeps its relative precision, where 1 + tanh has none left."""
    far = [-1e4, -80.0, -40.0, -1e-30, 0.0, 1e-30, 1e-3, 80.0, 1e4, 1e30]
    numbers = torch.cat([torch.linspace(-12, 12, 246), torch.tensor(far)])
    config = config_of(n_embd=256, n_head=2, n_layer=1, n_inner=256, activation_function=activation)
    stage = random_stage(config)
    block = stage.h["0"]
    for weight in (block.attn.out_proj.weight, block.mlp.fc_in.weight, block.mlp.fc_out.bias):
        weight.zero_()
    block.mlp.fc_in.bias.copy_(numbers)
    block.mlp.fc_out.weight.copy_(torch.eye(256))
    (ours,) = alone([packed(stage, OperandType.FLOAT32)], [Inputs(torch.zeros(1, 256))])
    torch.testing.assert_close(ours[0].double(), EXACT[activation](numbers.double()), rtol=1e-5, atol=1e-37)


def test_scores_that_only_one_token_survives(operand_type: OperandType) -> None:
    """Scores in the ten thousands: of the softmax all but the largest are 0, and nothing overflows."""
    stage = random_stage(CONFIG)
    for block in stage.h.values():
        block.attn.q_proj.weight *= 300
        block.attn.k_proj.weight *= 300
    sequences = random_inputs(60)
    (ours,) = alone([packed(stage, operand_type)], sequences)
    (theirs,) = alone([reference(stage)], sequences)
    assert ours.isfinite().all()
    if operand_type is OperandType.FLOAT32:  # else rounding decides which token is the largest
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_scores_beyond_fp32_are_seen(operand_type: OperandType) -> None:
    """Infinite scores are no zeros: of the first token as of the last."""
    stage = random_stage(CONFIG)
    for projection in (stage.h["1"].attn.q_proj, stage.h["1"].attn.k_proj):
        projection.weight *= 1e30
    (ours,) = alone([packed(stage, operand_type)], random_inputs(40))
    assert not ours.isfinite().all(dim=1).any()


@pytest.mark.usefixtures("int8_kernels")
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-37, 1e-30, 1e30, 3e38])
def test_int8_rows_of_any_size(size: float) -> None:
    """Where the scale would be subnormal a row counts as 0; where it would be infinite its products are not finite."""
    linear = nn.Linear(40, 33, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.randn(33, 40, generator=torch.Generator().manual_seed(0)))
    x = torch.linspace(-1, 1, 40)[None] * size
    ours = PackedLinear(linear, OperandType.INT8)(x)
    if size == 3e38:
        assert not ours.isfinite().any()
    elif size < 1e-36:
        assert torch.equal(ours, torch.zeros(1, 33))
    else:
        exact = linear.double()(x.double())
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=0.03 * exact.abs().max().item())
