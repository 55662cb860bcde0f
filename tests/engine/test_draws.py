"""Draws: noise that is a function of (seed, position), the right distribution, and no token changed by a rounding."""

import math
from collections.abc import Sequence

import pytest
import torch
from chi_square import p_value
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptj_serve.engine.draws import draw, draw_ranked, first_best, gumbel_noise, noise_for

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise_of(scores: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    return noise_for(scores.shape[1], seeds, positions, CPU)


def plain_draw(scores: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """At temperature 1."""
    return draw(scores, torch.ones(len(scores), 1, dtype=torch.float64), noise_of(scores, seeds, positions))


# ---------------------------------------------------------------------------------------------------------- noise

MASK = 2**64 - 1


def splitmix64_mix(x: int) -> int:
    """The finalizer of SplitMix64, in plain integers (Steele et al., 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def test_splitmix64_reference_is_itself_right():
    """First outputs for seed 1234567, from Vigna's splitmix64.c."""
    golden = 0x9E3779B97F4A7C15
    outputs = [splitmix64_mix(1234567 + i * golden & MASK) for i in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 2**31 - 1))
def test_noise_is_splitmix64_keyed_by_seed_and_position(seed: int, position: int):
    golden = 0x9E3779B97F4A7C15
    key = splitmix64_mix(splitmix64_mix(seed) + position * golden & MASK)
    expected = []
    for i in range(1, 6):
        uniform = ((splitmix64_mix(key + i * golden & MASK) >> 11) + 0.5) / 2**53
        expected.append(-math.log(-math.log(uniform)))
    actual = gumbel_noise([seed], [position], 5, CPU)[0].tolist()
    assert actual == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_noise_of_a_row_does_not_depend_on_the_others():
    seeds, positions = [5, 5, 2**63 - 1, 0], [0, 1, 2047, 0]
    together = gumbel_noise(seeds, positions, 100, CPU)
    for row in range(4):
        assert torch.equal(together[row], gumbel_noise([seeds[row]], [positions[row]], 100, CPU)[0])
    assert torch.equal(together[:, :10], gumbel_noise(seeds, positions, 10, CPU))


def test_noise_differs_between_seeds_and_positions():
    pairs = [(seed, position) for seed in range(30) for position in range(30)]
    noise = gumbel_noise([seed for seed, _ in pairs], [position for _, position in pairs], 8, CPU)
    assert len(set(noise.flatten().tolist())) == noise.numel()


@pytest.mark.parametrize("along", ["seeds", "positions", "places"])
def test_noise_is_uniform(along: str):
    n = 20_000
    run = list(range(n))
    noise = {
        "seeds": lambda: gumbel_noise(run, [3] * n, 1, CPU)[:, 0],
        "positions": lambda: gumbel_noise([3] * n, run, 1, CPU)[:, 0],
        "places": lambda: gumbel_noise([3], [3], n, CPU)[0],
    }[along]()
    uniform = (-(-noise).exp()).exp()  # back to what the noise was made from
    assert p_value(torch.histc(uniform, bins=100, min=0, max=1), torch.full((100,), n / 100)) > 1e-4
    neighbours = torch.corrcoef(torch.stack([uniform[1:], uniform[:-1]]))[0, 1]
    assert abs(neighbours) < 5 / n**0.5


# ---------------------------------------------------------------------------------------------------------- draws


def two_level_draw(scores: Tensor, noise: Tensor) -> Tensor:
    """The definition, in plain fp64: a group of 64 by the sum of its weights, then a token of it."""
    num_rows, vocab_size = scores.shape
    padded = torch.full((num_rows, -(-vocab_size // 64) * 64), -math.inf, dtype=torch.float64)
    padded[:, :vocab_size] = scores
    groups = padded.view(num_rows, -1, 64)
    group = (groups.logsumexp(dim=-1) + noise[:, :-64]).argmax(dim=-1)
    member = (groups[torch.arange(num_rows), group] + noise[:, -64:]).argmax(dim=-1)
    return group * 64 + member


@pytest.mark.parametrize("vocab_size", [1, 3, 63, 64, 65, 200, 3000])
def test_both_draws_equal_the_definition(vocab_size: int):
    n = 4_000 if vocab_size < 1000 else 500
    scores = 2 * randn(n, vocab_size, seed=vocab_size)
    seeds, positions = list(range(n)), [7 * i % 2048 for i in range(n)]
    noise = noise_of(scores, seeds, positions)
    temperatures = torch.linspace(0.1, 3, n, dtype=torch.float64)[:, None]
    expected = two_level_draw(scores / temperatures, noise)
    assert torch.equal(draw(scores, temperatures, noise), expected)
    order = torch.stack([torch.randperm(vocab_size, generator=torch.Generator().manual_seed(i)) for i in range(n)])
    assert torch.equal(draw_ranked((scores / temperatures).gather(1, order), order, noise), expected)


@pytest.mark.parametrize("vocab_size", [3, 64, 65, 200])
def test_draws_follow_the_softmax(vocab_size: int):
    """Vocabularies of one group of 64, exactly one, one and a bit, and several."""
    n = 30_000
    scores = 0.7 * randn(vocab_size, seed=vocab_size)
    drawn = plain_draw(scores.expand(n, -1), list(range(n)), [17] * n)
    assert p_value(torch.bincount(drawn, minlength=vocab_size), scores.double().softmax(-1) * n) > 1e-4


def test_draws_at_successive_positions_are_independent():
    n = 30_000
    scores = randn(5, seed=1)
    drawn = plain_draw(scores.expand(n, -1), [42] * n, list(range(n)))
    pairs = torch.bincount(drawn[1:] * 5 + drawn[:-1], minlength=25)
    share = scores.double().softmax(-1)
    assert p_value(pairs, torch.outer(share, share) * (n - 1), num_constraints=5) > 1e-4


def test_what_is_masked_is_never_drawn():
    scores = torch.full((500, 300), -math.inf)
    scores[:, [3, 131, 299]] = 0.0
    assert set(plain_draw(scores, list(range(500)), [0] * 500).tolist()) == {3, 131, 299}


@pytest.mark.parametrize("temperature", [1e-37, 1e-30, 1e-6])
def test_tiny_temperatures_are_greedy_and_huge_ones_uniform(temperature: float):
    scores = randn(200, 300)
    scores[:, ::7] = -math.inf
    noise = noise_of(scores, list(range(200)), [0] * 200)
    tiny = torch.full((200, 1), temperature, dtype=torch.float64)
    assert torch.equal(draw(scores, tiny, noise), scores.argmax(dim=-1))
    level = torch.where(scores.isfinite(), 0.0, -math.inf)
    assert torch.equal(draw(scores, 1 / tiny, noise), two_level_draw(level, noise))


@pytest.mark.parametrize("scale", [1e-4, 1e-6])
def test_a_rounding_difference_hardly_ever_changes_a_draw(scale: float):
    """Invariant 4 over batches and splits rests on this: scores that differ by e change a draw with probability ~e."""
    n = 5_000
    scores = randn(n, 1000)
    seeds, positions = list(range(n)), [0] * n
    nudged = scores + scale * randn(n, 1000, seed=1)
    changed = (plain_draw(scores, seeds, positions) != plain_draw(nudged, seeds, positions)).sum().item()
    assert changed <= 3 + 10 * scale * n


def test_numbers_that_are_not_sound_stay_in_their_row():
    """Which token they give means nothing, but there must be one, and the others' must be as ever."""
    scores = randn(8, 130)
    seeds, positions = list(range(8)), [0] * 8
    expected = plain_draw(scores, seeds, positions)
    scores[1] = math.nan
    scores[3, 5] = math.inf
    scores[5] = -math.inf
    scores[7, 129] = math.nan
    drawn = plain_draw(scores, seeds, positions)
    assert torch.equal(drawn[::2], expected[::2])
    everything = [drawn, first_best(scores), draw_ranked(scores, torch.arange(130).expand(8, -1), torch.zeros(8, 67))]
    assert all(0 <= token_id < 130 for token_ids in everything for token_id in token_ids.tolist())


# --------------------------------------------------------------------------------------------------------- greedy


@given(
    vocab_size=st.integers(1, 200),
    num_levels=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    masked=st.booleans(),
)
def test_first_best_is_the_lowest_id_among_the_best(vocab_size: int, num_levels: int, seed: int, masked: bool):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-num_levels, num_levels, (5, vocab_size), generator=generator).float()
    if masked:
        scores[scores < 0] = -math.inf
    expected = [row.index(max(row)) for row in scores.tolist()]
    assert first_best(scores).tolist() == expected
