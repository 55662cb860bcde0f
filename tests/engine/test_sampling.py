"""The sampler: transformers' processors, the right distribution, and noise that is a function of (seed, position)."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from gptj_serve.engine.sampling import gumbel_argmax, gumbel_noise, sample
from gptj_serve.types import RowFailure, SampledToken, SamplingParams

GREEDY = SamplingParams(max_new_tokens=1)
NUM_DRAWS = 600

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choose(logits: Tensor, params: list[SamplingParams], positions=None, suppressed=None) -> list[int]:
    positions = positions or [0] * len(params)
    results = sample(logits, params, positions, suppressed or [[]] * len(params))
    assert all(isinstance(result, SampledToken) for result in results)
    return [result.token_id for result in results]


def support(logits: list[float], **sampling: float) -> set[int]:
    """The ids that are ever drawn; each that may be drawn has a share far above 1 / NUM_DRAWS."""
    params = [SamplingParams(max_new_tokens=1, temperature=1.0, seed=seed, **sampling) for seed in range(NUM_DRAWS)]
    return set(choose(torch.tensor([logits] * NUM_DRAWS), params))


def kept_by(warper, logits: list[float]) -> set[int]:
    scores = warper(torch.zeros(1, 0, dtype=torch.long), torch.tensor([logits]))
    return set(scores[0].isfinite().nonzero().flatten().tolist())


# ---------------------------------------------------------------------------------------------------- processors


def test_temperature_zero_is_the_argmax_whatever_else_is_set():
    logits = randn(5, 300)
    params = [SamplingParams(max_new_tokens=1, seed=i, top_k=i, top_p=0.5) for i in range(5)]
    assert choose(logits, params) == logits.argmax(-1).tolist()


def test_top_k_1_is_greedy():
    logits = randn(40, 300)
    params = [SamplingParams(max_new_tokens=1, temperature=5.0, top_k=1, seed=i) for i in range(40)]
    assert choose(logits, params) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-40, 1e-300])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_tiny_temperature_is_greedy(temperature: float, top_p: float):
    logits = randn(40, 300)
    params = [SamplingParams(max_new_tokens=1, temperature=temperature, top_p=top_p, seed=i) for i in range(40)]
    assert choose(logits, params) == logits.argmax(-1).tolist()


few_logits = st.lists(st.sampled_from([-0.5, -0.25, 0.0, 0.25, 0.5]), min_size=1, max_size=10)


@settings(max_examples=30)
@given(logits=few_logits, top_k=st.integers(1, 12))
def test_top_k_keeps_what_transformers_keeps(logits: list[float], top_k: int):
    assert support(logits, top_k=top_k) == kept_by(TopKLogitsWarper(top_k), logits)  # ties with the k-th included


@settings(max_examples=30)
@given(logits=few_logits, top_p=st.sampled_from([0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999]))
def test_top_p_keeps_what_transformers_keeps(logits: list[float], top_p: float):
    mass = torch.tensor(logits).softmax(-1).sort(descending=True).values.cumsum(-1)
    assume(((mass - top_p).abs() > 1e-5).all())  # on the edge itself rounding decides
    expected = kept_by(TopPLogitsWarper(top_p), logits)
    actual = support(logits, top_p=top_p)
    # Which of several equal logits stay is not defined, only how many.
    assert sorted(logits[i] for i in actual) == sorted(logits[i] for i in expected)


@pytest.mark.parametrize(("top_p", "num_kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_top_p_on_its_edges(top_p: float, num_kept: int):
    """Four equal tokens: the smallest set whose mass reaches top_p."""
    logits = [2.0, 2.0, 2.0, 2.0]
    assert len(support(logits, top_p=top_p)) == num_kept
    if top_p < 1:
        assert len(kept_by(TopPLogitsWarper(top_p), logits)) == num_kept


def test_top_p_counts_the_mass_that_temperature_and_top_k_leave():
    logits = [2.0, 1.0, 0.0, 0.0]
    # Shares are 0.61, 0.22, 0.08, 0.08; of the first two alone 0.73, 0.27; at temperature 10 all are near 0.25.
    assert support(logits, top_p=0.7) == {0, 1}
    assert support(logits, top_p=0.7, top_k=2) == {0}
    params = [SamplingParams(max_new_tokens=1, temperature=10.0, top_p=0.7, seed=i) for i in range(NUM_DRAWS)]
    assert len(set(choose(torch.tensor([logits] * NUM_DRAWS), params))) == 3


def test_each_row_has_its_own_parameters():
    """Rows with and without noise, top_k and top_p in one batch choose what they choose alone."""
    logits = randn(6, 200)
    params = [
        GREEDY,
        SamplingParams(max_new_tokens=1, temperature=1.0, seed=1),
        SamplingParams(max_new_tokens=1, temperature=0.7, top_k=5, seed=2),
        SamplingParams(max_new_tokens=1, temperature=1.5, top_p=0.5, seed=3),
        SamplingParams(max_new_tokens=1, temperature=2.0, top_k=50, top_p=0.9, seed=4),
        SamplingParams(max_new_tokens=1, temperature=1.0, top_k=1000, seed=5),
    ]
    for position in range(30):
        suppressed = [[position, 7], [], [3], [], [1, 2], []]
        together = sample(logits, params, [position] * 6, suppressed)
        for row in range(6):
            alone = sample(logits[row : row + 1], [params[row]], [position], [suppressed[row]])
            assert alone[0].token_id == together[row].token_id
            assert math.isclose(alone[0].logprob, together[row].logprob, abs_tol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_suppressed_ids_are_never_chosen(temperature: float):
    logits = torch.tensor([[9.0, 8.0, 0.0, 0.1, 8.5]] * 200)
    params = [SamplingParams(max_new_tokens=1, temperature=temperature, seed=i) for i in range(200)]
    chosen = set(choose(logits, params, suppressed=[[0, 1, 4]] * 200))
    assert chosen == ({3} if temperature == 0 else {2, 3})
    assert logits[0, 0] == 9.0  # the caller's logits are left alone


def test_suppressed_ids_beyond_the_columns_have_no_effect():
    """A config's eos_token_id may lie beyond the ids that the tokenizer, and so the sampler, knows."""
    assert choose(torch.tensor([[1.0, 3.0, 2.0]]), [GREEDY], suppressed=[[1, 50256]]) == [2]


# -------------------------------------------------------------------------------------------------------- results


def test_logprob_is_that_of_the_raw_logits():
    logits = randn(20, 100) * 3
    params = [SamplingParams(max_new_tokens=1, temperature=0.1 * i, top_k=i, seed=i) for i in range(20)]
    expected = logits.double().log_softmax(-1)
    results = sample(logits, params, list(range(20)), [[0]] * 20)
    for row, result in enumerate(results):
        assert math.isclose(result.logprob, expected[row, result.token_id].item(), abs_tol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_or_infinity_fails_its_own_row_only(bad: float, temperature: float):
    logits = randn(4, 50)
    params = [SamplingParams(max_new_tokens=1, temperature=temperature, top_p=0.9, seed=i) for i in range(4)]
    sound = sample(logits, params, [0] * 4, [[]] * 4)
    logits[1, 17] = bad
    results = sample(logits, params, [0] * 4, [[]] * 4)
    assert isinstance(results[1], RowFailure)
    assert "NaN" in results[1].message
    assert [results[i] for i in (0, 2, 3)] == [sound[i] for i in (0, 2, 3)]


def test_minus_infinity_only_rules_a_token_out():
    logits = torch.tensor([[1.0, -math.inf, 0.5]] * 200)
    params = [SamplingParams(max_new_tokens=1, temperature=1.0, seed=i) for i in range(200)]
    assert set(choose(logits, params)) == {0, 2}
    assert isinstance(sample(torch.full((1, 3), -math.inf), [GREEDY], [0], [[]])[0], RowFailure)


def test_half_precision_logits_are_taken_as_fp32():
    logits = randn(3, 50).half()
    results = sample(logits, [GREEDY] * 3, [0] * 3, [[]] * 3)
    expected = logits.double().log_softmax(-1).max(-1).values
    assert all(math.isclose(r.logprob, e, abs_tol=1e-5) for r, e in zip(results, expected.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------- noise

MASK = 2**64 - 1


def splitmix64_mix(x: int) -> int:
    """The finalizer of SplitMix64, in plain integers (Steele et al., 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def uniforms_of(noise: Tensor) -> Tensor:
    """Back from Gumbel noise to what it was made from."""
    return (-(-noise).exp()).exp()


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
    actual = gumbel_noise([seed], [position], 5)[0].tolist()
    assert actual == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_noise_of_a_row_does_not_depend_on_the_others():
    seeds, positions = [5, 5, 2**63 - 1, 0], [0, 1, 2047, 0]
    together = gumbel_noise(seeds, positions, 100)
    for row in range(4):
        assert torch.equal(together[row], gumbel_noise([seeds[row]], [positions[row]], 100)[0])
    assert torch.equal(together[:, :10], gumbel_noise(seeds, positions, 10))


def test_noise_differs_between_seeds_and_positions():
    pairs = [(seed, position) for seed in range(30) for position in range(30)]
    noise = gumbel_noise([seed for seed, _ in pairs], [position for _, position in pairs], 8)
    assert len(set(noise.flatten().tolist())) == noise.numel()


@pytest.mark.parametrize("along", ["seeds", "positions", "places"])
def test_noise_is_uniform(along: str):
    n = 20_000
    run = list(range(n))
    noise = {
        "seeds": lambda: gumbel_noise(run, [3] * n, 1)[:, 0],
        "positions": lambda: gumbel_noise([3] * n, run, 1)[:, 0],
        "places": lambda: gumbel_noise([3], [3], n)[0],
    }[along]()
    uniform = uniforms_of(noise)
    counts = torch.histc(uniform, bins=100, min=0, max=1).double()
    assert chi_square_is_plausible(counts, torch.full((100,), n / 100))
    neighbours = torch.corrcoef(torch.stack([uniform[1:], uniform[:-1]]))[0, 1]
    assert abs(neighbours) < 5 / n**0.5


def chi_square_is_plausible(counts: Tensor, expected: Tensor) -> bool:
    """Within five standard deviations of chi-square with len - 1 degrees of freedom, whose variance is twice that."""
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("vocab_size", [3, 64, 65, 200])
def test_draws_follow_the_softmax(vocab_size: int):
    """Vocabularies of one group of 64, exactly one, one and a bit, and several."""
    n = 30_000
    scores = 0.7 * randn(vocab_size, seed=vocab_size)
    drawn = gumbel_argmax(scores.expand(n, -1), list(range(n)), [17] * n)
    expected = scores.double().softmax(-1) * n
    assert expected.min() > 5
    assert chi_square_is_plausible(torch.bincount(drawn, minlength=vocab_size), expected)


def test_draws_at_successive_positions_are_independent():
    n = 30_000
    scores = randn(5, seed=1)
    drawn = gumbel_argmax(scores.expand(n, -1), [42] * n, list(range(n)))
    pairs = torch.bincount(drawn[1:] * 5 + drawn[:-1], minlength=25)
    share = scores.double().softmax(-1)
    expected = torch.outer(share, share).flatten() * (n - 1)
    statistic = ((pairs - expected) ** 2 / expected).sum().item()
    assert abs(statistic - 20) < 5 * (2 * 20) ** 0.5  # 25 cells less 5 for the margins


def test_masked_groups_are_never_drawn():
    scores = torch.full((500, 300), -math.inf)
    scores[:, [3, 131, 299]] = 0.0
    drawn = gumbel_argmax(scores, list(range(500)), [0] * 500)
    assert set(drawn.tolist()) == {3, 131, 299}


@pytest.mark.parametrize("scale", [1e-4, 1e-6])
def test_a_rounding_difference_hardly_ever_changes_a_draw(scale: float):
    """Invariant 4 over batches and splits rests on this: scores that differ by e change a draw with probability ~e."""
    n = 5_000
    scores = randn(n, 1000)
    seeds, positions = list(range(n)), [0] * n
    nudged = scores + scale * randn(n, 1000, seed=1)
    changed = (gumbel_argmax(scores, seeds, positions) != gumbel_argmax(nudged, seeds, positions)).sum().item()
    assert changed <= 3 + 10 * scale * n
