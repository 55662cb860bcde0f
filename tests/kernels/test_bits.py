"""What comes of a token has the same bits whatever else is computed, however it is cut and on however many threads."""

import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gptj_serve.kernels.cpu_layers import CPULayers
from gptj_serve.kernels.weights import OperandType, PackedLinear
from tests.kernels.packed import (
    BLOCK_SIZE,
    Inputs,
    alone,
    config_of,
    packed,
    random_schedule,
    random_sequences,
    random_stage,
    run,
)
from tests.threads import torch_threads

CONFIGS = {
    "even": {"n_embd": 64, "n_head": 2, "rotary_dim": 16},
    "odd": {"n_embd": 102, "n_head": 3, "rotary_dim": 10, "n_inner": 77},
    "many heads": {"n_embd": 512, "n_head": 32, "rotary_dim": 8},
    "one head": {"n_embd": 80, "n_head": 1, "n_inner": 300, "activation_function": "silu"},
}
NUM_LAYERS = 3
CUTS = [(), (1,), (2,), (1, 2)]


@cache
def chain(name: str, operand_type: OperandType, kv_dtype: torch.dtype, cuts: tuple[int, ...]) -> list[CPULayers]:
    config = config_of(**CONFIGS[name], n_layer=NUM_LAYERS)
    spans = [range(*ends) for ends in pairwise([0, *cuts, NUM_LAYERS])]
    return [packed(random_stage(config, span), operand_type, kv_dtype) for span in spans]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert theirs.isfinite().all()
        assert torch.equal(ours, theirs), f"{(ours != theirs).sum()} of {ours.numel()} numbers differ"


@pytest.mark.parametrize("name", CONFIGS)
def test_bits_depend_on_the_sequence_alone(operand_type: OperandType, name: str) -> None:
    kv_dtype = {OperandType.FLOAT32: torch.float32, OperandType.BFLOAT16: torch.bfloat16}.get(operand_type)
    if kv_dtype is None:  # int8 goes with either
        kv_dtype = torch.bfloat16 if name == "odd" else torch.float32
    whole = chain(name, operand_type, kv_dtype, ())

    @given(
        lengths=st.lists(st.integers(1, 120), min_size=1, max_size=6),
        seed=st.integers(0, 2**32 - 1),
        num_threads=st.integers(1, 3),
        cuts=st.sampled_from(CUTS),
    )
    @settings(max_examples=5)
    def check(lengths: list[int], seed: int, num_threads: int, cuts: tuple[int, ...]) -> None:
        rng = random.Random(seed)
        sequences = random_sequences(config_of(**CONFIGS[name]), lengths, rng)
        expected = alone(whole, sequences)
        with torch_threads(num_threads):
            schedule = random_schedule(sequences, rng)
            ours = run(chain(name, operand_type, kv_dtype, cuts), sequences, schedule, seed)
        assert_same_bits(ours, expected)

    check()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_token_by_token_is_at_once(operand_type: OperandType, num_threads: int) -> None:
    """Across the ends of blocks, and of the queries that attend together."""
    layers = chain("odd", operand_type, torch.float32, ())
    sequences = [Inputs(torch.randn(n, 102, generator=torch.Generator().manual_seed(n))) for n in (83, 40, 1)]
    schedule = [[(0, 1)] for _ in range(20)] + [[(0, 1), (1, 1)] for _ in range(40)] + [[(2, 1), (0, 1)]]
    schedule += [[(0, 1)] for _ in range(22)]
    with torch_threads(num_threads):
        assert_same_bits(run(layers, sequences, schedule), alone(layers, sequences))


def test_chunks_of_every_length(operand_type: OperandType) -> None:
    layers = chain("even", operand_type, torch.float32, ())
    sequence = Inputs(torch.randn(70, 64, generator=torch.Generator().manual_seed(0)))
    (expected,) = alone(layers, [sequence])
    for length in range(1, 35):
        schedule = [[(0, min(length, 70 - start))] for start in range(0, 70, length)]
        assert_same_bits(run(layers, [sequence], schedule), [expected])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_token_of_one_row_ends_a_block_that_another_reads(
    operand_type: OperandType, num_threads: int, order: tuple[int, int]
) -> None:
    """In the same microbatch, in which each row has one token."""
    layers = chain("many heads", operand_type, torch.float32, ())
    hidden = torch.randn(BLOCK_SIZE + 1, 512, generator=torch.Generator().manual_seed(0))
    sequences = [Inputs(hidden[:BLOCK_SIZE]), Inputs(hidden, parent=0, num_shared=BLOCK_SIZE)]
    expected = alone(layers, sequences)
    schedule = [[(0, BLOCK_SIZE - 1)], [(index, 1) for index in order]]
    with torch_threads(num_threads):
        for _ in range(5):
            assert_same_bits(run(layers, sequences, schedule), expected)


def test_many_rows_at_once(operand_type: OperandType) -> None:
    """More than are multiplied together, each a token of a sequence of its own."""
    layers = chain("odd", operand_type, torch.float32, (1,))
    generator = torch.Generator().manual_seed(0)
    sequences = [Inputs(torch.randn(2, 102, generator=generator)) for _ in range(45)]
    expected = alone(chain("odd", operand_type, torch.float32, ()), sequences)
    for num_rows in (45, 28, 13, 12, 7):
        some = sequences[:num_rows]
        both = [[(i, 1) for i in range(num_rows)]] * 2
        assert_same_bits(run(layers, some, both), expected[:num_rows])


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("shape", [(50, 33), (97, 300), (5, 3)])
def test_a_row_of_a_product_does_not_depend_on_others(
    operand_type: OperandType, num_threads: int, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    product: Callable[[Tensor], Tensor] = PackedLinear(nn.Linear(*shape).requires_grad_(False), operand_type)
    x = torch.randn(40, shape[0])
    expected = torch.cat([product(row[None]) for row in x])
    assert expected.shape == (40, shape[1])
    with torch_threads(num_threads):
        for num_rows in range(1, 41):
            for first in {0, (40 - num_rows) // 2, 40 - num_rows}:
                part = slice(first, first + num_rows)
                assert torch.equal(product(x[part]), expected[part])
        assert torch.equal(product(x.view(5, 8, -1)), expected.view(5, 8, -1))
        assert torch.equal(product(x[7]), expected[7])
        assert torch.equal(product(x.T.contiguous().T), expected)
        assert product(x[:0]).shape == (0, shape[1])


def test_a_product_is_the_linear_layer_s(operand_type: OperandType) -> None:
    torch.manual_seed(0)
    largest_error = {OperandType.FLOAT32: 1e-5, OperandType.BFLOAT16: 0.02, OperandType.INT8: 0.02}[operand_type]
    for linear in (nn.Linear(200, 70), nn.Linear(200, 70, bias=False), nn.Linear(200, 4200)):
        linear.requires_grad_(False)
        x = torch.randn(9, 200)
        error = (PackedLinear(linear, operand_type)(x) - linear(x)).abs().max() / linear(x).abs().max()
        assert error < largest_error
