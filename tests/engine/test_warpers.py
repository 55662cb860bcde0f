"""The warpers against transformers', which are given fp64 scores here: then not even roundings differ.

A vocabulary of 150 is sorted whole; one of 3,000 is looked at through its best tokens first.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from gptj_serve.engine import warpers as module
from gptj_serve.engine.warpers import Knobs, narrowed
from gptj_serve.types import Warpers

NO_IDS = torch.zeros(1, 0, dtype=torch.long)
SMALL, LARGE = 150, 3_000

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def random_scores(num_rows: int, vocab_size: int, seed: int, scale: float = 3.0) -> Tensor:
    scores = scale * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    scores[:, seed % 7 :: 7] = -math.inf  # as bans leave them
    return scores


def distributions(scores: Tensor, warpers: list[Warpers]) -> Tensor:
    """Each row's distribution after its warpers: [R, V]."""
    result = torch.full(scores.shape, math.nan, dtype=torch.float64)
    for part in narrowed(scores, Knobs.of(warpers)):
        assert result[part.rows].isnan().all(), "a row came twice"
        whole = torch.full((len(part.rows), scores.shape[1]), -math.inf, dtype=torch.float64)
        result[part.rows] = whole.scatter(1, part.token_ids, part.x).softmax(dim=-1)
    assert not result.isnan().any(), "a row is missing"
    return result


def transformers_list(warpers: Warpers) -> LogitsProcessorList:
    """As `GenerationMixin._get_logits_processor` puts them together."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(warpers.temperature)])
    if warpers.top_k > 0:
        processors.append(TopKLogitsWarper(warpers.top_k))
    if warpers.top_p < 1:
        processors.append(TopPLogitsWarper(warpers.top_p))
    if warpers.min_p > 0:
        processors.append(MinPLogitsWarper(warpers.min_p))
    if warpers.typical_p < 1:
        processors.append(TypicalLogitsWarper(warpers.typical_p))
    if warpers.epsilon_cutoff > 0:
        processors.append(EpsilonLogitsWarper(warpers.epsilon_cutoff))
    if warpers.eta_cutoff > 0:
        processors.append(EtaLogitsWarper(warpers.eta_cutoff))
    return processors


def expected_distribution(row: Tensor, warpers: Warpers) -> Tensor:
    return transformers_list(warpers)(NO_IDS, row.double()[None])[0].softmax(dim=-1)


def check(scores: Tensor, warpers: list[Warpers]) -> None:
    actual = distributions(scores, warpers)
    for row, w in enumerate(warpers):
        expected = expected_distribution(scores[row], w)
        assert torch.equal(actual[row] > 0, expected > 0), f"{w} keeps other tokens"
        torch.testing.assert_close(actual[row], expected, rtol=1e-9, atol=1e-12)


SETTINGS = {
    "top-k": {"top_k": 5},
    "a large top-k": {"top_k": 1_500},
    "more than all": {"top_k": 10_000},
    "top-p": {"top_p": 0.8},
    "nearly all": {"top_p": 0.9999},
    "hardly any": {"top_p": 1e-5},
    "min-p": {"min_p": 0.1},
    "a low min-p": {"min_p": 1e-6},
    "the highest min-p": {"min_p": 1.0},
    "typical": {"typical_p": 0.7},
    "hardly typical": {"typical_p": 0.05},
    "epsilon": {"epsilon_cutoff": 0.01},
    "eta": {"eta_cutoff": 0.01},
    "top-k, top-p": {"top_k": 20, "top_p": 0.8},
    "top-p, typical": {"top_p": 0.95, "typical_p": 0.6},
    "top-p, min-p": {"top_p": 0.95, "min_p": 0.05},
    "min-p, epsilon, eta": {"min_p": 0.01, "epsilon_cutoff": 0.02, "eta_cutoff": 0.3},
    "all": {
        "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8, "epsilon_cutoff": 0.01, "eta_cutoff": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_each_keeps_what_transformers_keeps(setting: dict[str, float], vocab_size: int, temperature: float):
    check(random_scores(6, vocab_size, seed=3), [Warpers(temperature=temperature, **setting)] * 6)


@st.composite
def any_warpers(draw: st.DrawFn) -> Warpers:
    share = st.floats(1e-4, 0.9999)
    ranges = {
        "top_k": st.integers(1, SMALL + 10) | st.integers(1, LARGE + 10),
        "top_p": share,
        "min_p": share | st.just(1.0),
        "typical_p": share,
        "epsilon_cutoff": st.floats(1e-6, 0.5),
        "eta_cutoff": st.floats(1e-6, 0.5),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(ranges))))
    return Warpers(temperature=draw(st.floats(0.05, 5)), **{name: draw(ranges[name]) for name in sorted(chosen)})


@settings(max_examples=60)
@given(
    warpers=st.lists(any_warpers(), min_size=1, max_size=8),
    vocab_size=st.sampled_from([SMALL, LARGE]),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_with_any_warpers_equal_transformers(warpers: list[Warpers], vocab_size: int, seed: int):
    check(random_scores(len(warpers), vocab_size, seed), warpers)


def test_a_row_is_the_same_alone_and_among_others():
    kinds = [Warpers(temperature=0.7, **setting) for setting in SETTINGS.values()]
    scores = random_scores(len(kinds), LARGE, seed=9)
    together = distributions(scores, kinds)
    for row, warpers in enumerate(kinds):
        torch.testing.assert_close(together[row], distributions(scores[row : row + 1], [warpers])[0], rtol=0, atol=1e-9)


def test_rows_that_need_all_tokens_keep_their_places():
    """Two are known to from the start, the two between them turn out to."""
    kinds = [Warpers(temperature=1.0, typical_p=0.9), Warpers(temperature=4.0, top_p=0.999)] * 2
    check(random_scores(4, LARGE, seed=9), kinds)


# ---------------------------------------------------------------------------------------------- equal tokens

# Half-precision logits are multiples of a step: many are equal.
few_logits = st.lists(st.sampled_from([-0.5, -0.25, 0.0, 0.25, 0.5]), min_size=1, max_size=12)


@given(logits=few_logits, top_k=st.integers(1, 14))
def test_tokens_as_good_as_the_kth_stay(logits: list[float], top_k: int):
    check(torch.tensor([logits]), [Warpers(temperature=1.0, top_k=top_k)])


@pytest.mark.parametrize("num_tied", [100, 1_500])
def test_ties_beyond_the_ranked_tokens_are_found(num_tied: int):
    scores = torch.full((1, LARGE), -5.0)
    scores[0, 200 : 200 + num_tied] = 2.0
    scores[0, 7] = 3.0
    for setting in ({"top_k": 50}, {"min_p": 0.2}, {"min_p": 0.2, "typical_p": 0.9}):
        warpers = Warpers(temperature=1.0, **setting)
        check(scores, [warpers])
        assert distributions(scores, [warpers])[0, 200 : 200 + num_tied].all()


@given(num_tokens=st.integers(2, 40), data=st.data())
def test_top_p_among_equals_keeps_as_many_as_on_paper(num_tokens: int, data: st.DataObject):
    """The smallest number whose shares reach top_p: j of n at j / n, whatever the roundings of n shares add up to."""
    num_kept = data.draw(st.integers(1, num_tokens - 1))
    kept = distributions(torch.full((1, num_tokens), 2.5), [Warpers(temperature=1.0, top_p=num_kept / num_tokens)])
    assert (kept[0] > 0).tolist() == [True] * num_kept + [False] * (num_tokens - num_kept)


@pytest.mark.parametrize("num_leading", [64, 1024])
def test_which_equals_top_p_keeps_does_not_depend_on_how_far_one_looks(
    num_leading: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "NUM_LEADING", num_leading)
    scores = torch.randint(-40, 20, (20, LARGE), generator=torch.Generator().manual_seed(4)) / 4
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)  # the lower id first among equals
    mass = (ranked.double() / 0.8).softmax(-1).cumsum(-1)
    for top_p in (0.02, 0.3, 0.6):
        kept = distributions(scores, [Warpers(temperature=0.8, top_p=top_p)] * 20) > 0
        num_kept = (mass < top_p).sum(dim=-1, keepdim=True) + 1
        expected = torch.arange(LARGE).expand(20, -1) < num_kept
        assert torch.equal(kept.gather(1, order), expected)


# ----------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_tiny_temperature_leaves_the_best(setting: dict[str, float], temperature: float):
    scores = random_scores(5, LARGE, seed=1)
    scores[torch.arange(5), scores.argmax(-1)] += 1.0
    kept = distributions(scores, [Warpers(temperature=temperature, **setting)] * 5)
    assert kept.argmax(-1).tolist() == scores.argmax(-1).tolist()
    assert (kept.amax(-1) > 1 - 1e-12).all()


def test_an_infinite_temperature_makes_equals_of_what_is_possible():
    scores = random_scores(1, SMALL, seed=1)
    kept = distributions(scores, [Warpers(temperature=math.inf, typical_p=0.9999)])[0]
    assert torch.equal(kept > 0, scores[0].isfinite())
    torch.testing.assert_close(kept.amax(), 1 / scores[0].isfinite().sum().double())


def test_what_is_asked_for():
    kinds = [
        Warpers(),
        Warpers(temperature=1.0),
        Warpers(temperature=1.0, top_k=1),
        Warpers(temperature=1.0, top_k=50),
        Warpers(temperature=1.0, eta_cutoff=0.1),
        Warpers(temperature=0.0, top_p=0.5),
    ]
    knobs = Knobs.of(kinds)
    assert knobs.is_drawn.tolist() == [False, True, False, True, True, False]
    assert knobs.narrows(100).tolist() == [False, False, True, True, True, True]
    assert knobs.narrows(50).tolist() == [False, False, True, False, True, True]
