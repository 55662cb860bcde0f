"""The sampler as a whole: the distribution that transformers' processors give, rows that don't touch each other, and
failures that stay where they belong."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from chi_square import p_value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.modeling_outputs import CausalLMOutput

from gptj_serve.engine import sampling as module
from gptj_serve.engine.sampling import NOT_FINITE, NOT_FINITE_AFTER_EDITS, NOTHING_POSSIBLE, sample
from gptj_serve.steps import LogitEdits, RowResult, SampledToken, SampleSpec
from gptj_serve.types import Warpers

GREEDY = SampleSpec()
NUM_DRAWS = 4_000

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(logits: Tensor, specs: list[SampleSpec], positions: list[int] | None = None, **more: Any) -> list[RowResult]:
    return sample(logits.clone(), specs, positions or [0] * len(specs), **more)


def tokens(results: list[RowResult]) -> list[SampledToken]:
    assert all(result.failure is None and len(result.tokens) == 1 for result in results), results
    return [result.tokens[0] for result in results]


def choose(logits: Tensor, specs: list[SampleSpec], positions: list[int] | None = None) -> list[int]:
    return [token.token_id for token in tokens(run(logits, specs, positions))]


# ------------------------------------------------------------------------------------------------------- greedy


def test_temperature_zero_is_the_argmax_whatever_else_is_set():
    logits = randn(5, 300)
    specs = [SampleSpec(Warpers(top_k=i, top_p=0.5, min_p=0.1, typical_p=0.2), seed=i) for i in range(5)]
    assert choose(logits, specs) == logits.argmax(-1).tolist()


def test_top_k_1_is_greedy():
    """Also among equals, where transformers would draw."""
    logits = (2 * randn(40, 300)).round()
    specs = [SampleSpec(Warpers(temperature=5.0, top_k=1, top_p=0.9), seed=i) for i in range(40)]
    assert choose(logits, specs) == choose(logits, [GREEDY] * 40) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-40, 1e-300])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"top_k": 7, "typical_p": 0.9}])
def test_a_tiny_temperature_is_greedy(temperature: float, more: dict[str, float]):
    logits = randn(40, 300)
    specs = [SampleSpec(Warpers(temperature=temperature, **more), seed=i) for i in range(40)]
    assert choose(logits, specs) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_banned_tokens_are_never_chosen(temperature: float):
    logits = torch.tensor([[9.0, 8.0, 0.0, 0.1, 8.5]] * 200)
    edits = LogitEdits(banned_token_ids=[0, 1, 4, 50256])
    chosen = choose(logits, [SampleSpec(Warpers(temperature=temperature), seed=i, edits=edits) for i in range(200)])
    assert set(chosen) == ({3} if temperature == 0 else {2, 3})


# ------------------------------------------------------------------------------------------- the distribution


HISTORY = torch.tensor([[1, 4, 4, 9, 1]])
EOS = 2

WARPERS: dict[str, tuple[Warpers, list[LogitsProcessor]]] = {
    "temperature": (Warpers(temperature=0.6), [TemperatureLogitsWarper(0.6)]),
    "hot": (Warpers(temperature=3.0), [TemperatureLogitsWarper(3.0)]),
    "top_k": (Warpers(temperature=1.0, top_k=4), [TopKLogitsWarper(4)]),
    "top_p": (Warpers(temperature=1.0, top_p=0.7), [TopPLogitsWarper(0.7)]),
    "min_p": (Warpers(temperature=1.0, min_p=0.2), [MinPLogitsWarper(0.2)]),
    "typical_p": (Warpers(temperature=1.0, typical_p=0.6), [TypicalLogitsWarper(0.6)]),
    "epsilon": (Warpers(temperature=1.0, epsilon_cutoff=0.05), [EpsilonLogitsWarper(0.05)]),
    "eta": (Warpers(temperature=1.0, eta_cutoff=0.4), [EtaLogitsWarper(0.4)]),
    "all": (
        Warpers(temperature=1.4, top_k=12, top_p=0.97, min_p=0.03, typical_p=0.9, epsilon_cutoff=0.03, eta_cutoff=0.04),
        [
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.97),
            MinPLogitsWarper(0.03),
            TypicalLogitsWarper(0.9),
            EpsilonLogitsWarper(0.03),
            EtaLogitsWarper(0.04),
        ],
    ),
}

EDITS: dict[str, tuple[LogitEdits | None, list[LogitsProcessor]]] = {
    "plain": (None, []),
    "edited": (
        LogitEdits(
            biases=[(3, 1.0), (5, -1.0)],
            repetition_penalty=1.5,
            seen_token_ids=[1, 4, 9],
            banned_token_ids=[7, 0],
            allowed_mask=b"\xff\xfd",  # all of 16 but 9
            boosted_token_ids=[EOS],
            boost=1.5**2 - 1,
        ),
        [
            SequenceBiasLogitsProcessor([[[3], 1.0], [[5], -1.0]]),
            RepetitionPenaltyLogitsProcessor(1.5),
            SuppressTokensLogitsProcessor([7]),
            MinLengthLogitsProcessor(50, 0),
            PrefixConstrainedLogitsProcessor(lambda batch, history: [i for i in range(16) if i != 9], 1),
            ExponentialDecayLengthPenalty((2, 1.5), EOS, 1),
        ],
    ),
}


@pytest.mark.parametrize("edits", EDITS.keys())
@pytest.mark.parametrize("warpers", WARPERS.keys())
def test_draws_follow_the_distribution_of_transformers_processors(warpers: str, edits: str):
    logits = randn(1, 16, seed=12).clamp(-2, 1)
    (warp, warp_processors), (edit, edit_processors) = WARPERS[warpers], EDITS[edits]
    shares = LogitsProcessorList(edit_processors + warp_processors)(HISTORY, logits.clone())[0].double().softmax(-1)
    specs = [SampleSpec(warp, n // 50, edit) for n in range(NUM_DRAWS)]
    drawn = torch.tensor(choose(logits.expand(NUM_DRAWS, -1), specs, [n % 50 for n in range(NUM_DRAWS)]))
    assert (shares > 0.02).sum() > 2
    assert p_value(torch.bincount(drawn, minlength=16), shares * NUM_DRAWS) > 1e-4


def test_the_fit_is_not_by_weakness_of_the_test():
    """A quarter of temperature more is found out."""
    logits = randn(1, 16, seed=12).clamp(-2, 1)
    specs = [SampleSpec(Warpers(temperature=1.25), seed) for seed in range(NUM_DRAWS)]
    drawn = torch.tensor(choose(logits.expand(NUM_DRAWS, -1), specs))
    assert p_value(torch.bincount(drawn, minlength=16), logits[0].double().softmax(-1) * NUM_DRAWS) < 1e-4


# ------------------------------------------------------------------------------------------------ among others


def mixed_specs() -> list[SampleSpec]:
    """Greedy and drawn, narrowed in every way, with and without edits, candidates and alternatives."""
    mask = np.packbits(np.arange(2_000) % 3 > 0, bitorder="little").tobytes()
    edits = [
        None,
        LogitEdits(banned_token_ids=[5, 6, 7]),
        LogitEdits(repetition_penalty=1.4, seen_token_ids=list(range(50))),
        LogitEdits(allowed_mask=mask),
        LogitEdits(biases=[(3, 6.0)], presence_penalty=0.5, frequency_penalty=0.2, output_counts=[(3, 2), (9, 1)]),
        LogitEdits(forced_token_ids=[1, 2]),
        LogitEdits(boosted_token_ids=[9], boost=3.0),
    ]
    warpers = [Warpers(), *(warp for warp, _ in WARPERS.values()), Warpers(temperature=0.9, top_k=1_200)]
    specs = [SampleSpec(warp, seed, edit) for seed, warp in enumerate(warpers) for edit in edits]
    specs += [SampleSpec(num_candidates=n, edits=edit) for n, edit in enumerate(edits, 1)]
    return specs + [SampleSpec(Warpers(temperature=1.0), 5, num_top_logprobs=n) for n in (1, 20)]


@pytest.mark.parametrize("rows_at_once", [7, 1_000])
def test_every_row_is_as_if_it_were_alone(rows_at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows_at_once)
    specs = mixed_specs()
    logits = 3 * randn(len(specs), 2_000, seed=2)
    positions = [3 * row for row in range(len(specs))]
    together = run(logits, specs, positions)
    for row, result in enumerate(together):
        (alone,) = run(logits[row : row + 1], [specs[row]], [positions[row]])
        assert [token.token_id for token in alone.tokens] == [token.token_id for token in result.tokens]
        assert [token_id for token_id, _ in alone.candidates] == [token_id for token_id, _ in result.candidates]
        logprobs = [[t.logprob for t in r.tokens] + [p for _, p in r.candidates] for r in (alone, result)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_or_infinity_fails_its_own_row_only(bad: float):
    specs = mixed_specs()
    logits = 3 * randn(len(specs), 2_000, seed=2)
    sound = run(logits, specs)
    for victims in (slice(0, None, 2), slice(1, None, 2)):
        poisoned = logits.clone()
        poisoned[victims, 1_700] = bad
        results = run(poisoned, specs)
        assert results[victims] == [RowResult(failure=NOT_FINITE, is_kv_suspect=True)] * len(specs[victims])
        spared = slice(1 - victims.start, None, 2)
        assert results[spared] == sound[spared]


def test_a_row_for_which_nothing_is_possible_fails_alone():
    specs = mixed_specs()
    nothing = [
        LogitEdits(banned_token_ids=list(range(2_000))),
        LogitEdits(allowed_mask=b"\x00"),
        LogitEdits(allowed_mask=b"\x0f", banned_token_ids=[0, 1, 2, 3]),
        LogitEdits(forced_token_ids=[2_000]),
    ]
    logits = 3 * randn(len(specs), 2_000, seed=2)
    sound = run(logits, specs)
    for start in range(4):
        changed = list(specs)
        for row in range(start, len(specs), 4):
            warpers = specs[row].warpers
            changed[row] = SampleSpec(warpers, edits=nothing[row // 4 % 4])
        results = run(logits, changed)
        for row, result in enumerate(results):
            assert result == (RowResult(failure=NOTHING_POSSIBLE) if row % 4 == start else sound[row])


def test_edits_that_overflow_fail_alone_and_say_so():
    edits = [
        LogitEdits(biases=[(1, math.inf)]),
        LogitEdits(biases=[(1, math.nan)]),
        LogitEdits(repetition_penalty=1e-300, seen_token_ids=[0, 1, 2]),
    ]
    for warpers in (Warpers(), Warpers(temperature=1.0), Warpers(temperature=1.0, top_p=0.9)):
        specs = [SampleSpec(warpers, edits=edit) for edit in (*edits, None)]
        *bad, good = run(1 + randn(1, 40).abs().expand(4, -1), specs)
        assert [result.failure for result in bad] == [NOT_FINITE_AFTER_EDITS] * 3
        assert good.failure is None


def test_minus_infinity_only_rules_a_token_out():
    logits = torch.tensor([[1.0, -math.inf, 0.5]] * 200)
    specs = [SampleSpec(Warpers(temperature=1.0), seed=i) for i in range(200)]
    assert set(choose(logits, specs)) == {0, 2}
    assert run(torch.full((1, 3), -math.inf), [GREEDY]) == [RowResult(failure=NOT_FINITE, is_kv_suspect=True)]


# -------------------------------------------------------------------------------------------- log-probabilities


def test_logprobs_are_those_of_the_raw_logits():
    logits = 3 * randn(20, 100)
    edits = LogitEdits(banned_token_ids=[0], biases=[(5, 8.0)])
    specs = [
        SampleSpec(Warpers(temperature=0.1 * i, top_k=i), seed=i, edits=edits if i % 2 else None, num_top_logprobs=i)
        for i in range(20)
    ]
    expected = logits.double().log_softmax(-1)
    for row, token in enumerate(tokens(run(logits, specs))):
        assert math.isclose(token.logprob, expected[row, token.token_id], abs_tol=1e-5)
        best = expected[row].topk(row)
        assert [token_id for token_id, _ in token.top_logprobs] == best.indices.tolist()
        assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_alternatives_are_all_tokens_at_most_and_the_lower_id_comes_first_among_equals():
    (token,) = tokens(run(torch.tensor([[1.0, 2.0, 1.0, 2.0]]), [SampleSpec(num_top_logprobs=9)]))
    assert [token_id for token_id, _ in token.top_logprobs] == [1, 3, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_taken_as_fp32(dtype: torch.dtype):
    logits = randn(3, 50).to(dtype)
    expected = logits.double().log_softmax(-1).max(-1).values
    results = tokens(run(logits, [GREEDY] * 3))
    assert [token.logprob for token in results] == pytest.approx(expected.tolist(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------- candidates


@settings(max_examples=40)
@given(
    num_candidates=st.integers(1, 60), edits=st.sampled_from([e for e, _ in EDITS.values()]), seed=st.integers(0, 99)
)
def test_candidates_are_the_best_of_processed_log_probabilities(
    num_candidates: int, edits: LogitEdits | None, seed: int
):
    """What transformers' `_beam_search` takes the best of, less each beam's own score."""
    logits = 3 * randn(2, 16, seed=seed)
    expected = logits.log_softmax(-1)
    if edits is not None:
        expected = LogitsProcessorList(EDITS["edited"][1])(HISTORY.expand(2, -1), expected)
    results = run(logits, [SampleSpec(num_candidates=num_candidates, edits=edits)] * 2)
    for row, result in enumerate(results):
        assert result.failure is None
        assert result.tokens == []
        finite = sorted(range(16), key=lambda token_id, row=row: -expected[row, token_id])
        finite = [token_id for token_id in finite if expected[row, token_id] > -math.inf][:num_candidates]
        assert [token_id for token_id, _ in result.candidates] == finite
        scores = [score for _, score in result.candidates]
        assert scores == pytest.approx(expected[row, finite].tolist(), abs=1e-5)


def test_a_beam_that_can_not_go_on_has_no_candidates():
    spec = SampleSpec(num_candidates=4, edits=LogitEdits(allowed_mask=b"\x00"))
    assert run(randn(1, 40), [spec]) == [RowResult(candidates=[])]


# ------------------------------------------------------------------------------------------------------ guidance


def guided_by_transformers(scale: float, logits: Tensor, unconditional: Tensor) -> Tensor:
    class Model:
        def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutput:
            return CausalLMOutput(logits=unconditional[None, None])

    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, Model())
    return processor(torch.tensor([[1, 2]]), logits[None])[0]


@given(scale=st.floats(0, 8).filter(lambda scale: scale != 1), seed=st.integers(0, 1_000))
def test_guidance_equals_transformers(scale: float, seed: int):
    logits, unconditional = 3 * randn(2, 40, seed=seed)
    expected = guided_by_transformers(scale, logits, unconditional)
    spec = SampleSpec(guidance_scale=scale, num_candidates=40)
    (result,) = run(logits[None], [spec], unconditional=unconditional[None])
    token_ids = [token_id for token_id, _ in result.candidates]
    torch.testing.assert_close(
        torch.tensor([score for _, score in result.candidates]), expected[token_ids], rtol=1e-5, atol=1e-5
    )
    (token,) = tokens(run(logits[None], [SampleSpec(guidance_scale=scale)], unconditional=unconditional[None]))
    assert math.isclose(token.logprob, logits.log_softmax(-1)[token.token_id], abs_tol=1e-5)


def test_guided_draws_follow_the_guided_distribution_after_edits_and_warpers():
    logits, unconditional = randn(2, 16, seed=5)
    edits, processors = EDITS["edited"]
    guided = guided_by_transformers(2.5, logits, unconditional)
    chain = LogitsProcessorList([*processors, TemperatureLogitsWarper(1.7), TopKLogitsWarper(9)])
    shares = chain(HISTORY, guided[None])[0].double().softmax(-1)
    warpers = Warpers(temperature=1.7, top_k=9)
    specs = [SampleSpec(warpers, seed, edits, guidance_scale=2.5) for seed in range(NUM_DRAWS)]
    results = run(logits.expand(NUM_DRAWS, -1), specs, unconditional=unconditional.expand(NUM_DRAWS, -1).clone())
    drawn = torch.tensor([token.token_id for token in tokens(results)])
    assert p_value(torch.bincount(drawn, minlength=16), shares * NUM_DRAWS) > 1e-4


def test_each_guided_row_has_its_own_unconditional_logits(monkeypatch: pytest.MonkeyPatch):
    """Also where the rows are worked on in parts, with others between them."""
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)
    logits, unconditional = 2 * randn(10, 40, seed=1), 2 * randn(5, 40, seed=2)
    specs = [SampleSpec(guidance_scale=3.0) if row % 2 else GREEDY for row in range(10)]
    expected = logits.argmax(-1)
    for row in range(1, 10, 2):
        expected[row] = guided_by_transformers(3.0, logits[row], unconditional[row // 2]).argmax()
    assert [token.token_id for token in tokens(run(logits, specs, unconditional=unconditional))] == expected.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unsound_unconditional_logits_fail_the_row_that_they_guide(bad: float):
    logits, unconditional = randn(4, 40, seed=1), randn(2, 40, seed=2)
    unconditional[1, 3] = bad
    specs = [GREEDY, SampleSpec(guidance_scale=2.0), GREEDY, SampleSpec(guidance_scale=2.0)]
    results = run(logits, specs, unconditional=unconditional)
    assert [result.failure for result in results] == [None, None, None, NOT_FINITE]
