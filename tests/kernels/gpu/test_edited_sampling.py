"""Rows of all kinds together on the device: tokens, log-probabilities and failures are those of `engine.sampling`."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gptj_serve.engine.ranking import best
from gptj_serve.engine.sampling import NOT_FINITE, NOT_FINITE_AFTER_EDITS, NOTHING_POSSIBLE, sample
from gptj_serve.kernels.gpu.edited_sampling import MAX_ROWS_AT_ONCE, best_of, sample_on_gpu
from gptj_serve.steps import LogitEdits, RowResult, SampleSpec
from gptj_serve.types import Warpers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
V = 300


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(actual: list[RowResult], wanted: list[RowResult]) -> None:
    assert len(actual) == len(wanted)
    for one, other in zip(actual, wanted, strict=True):
        assert (one.failure, one.is_kv_suspect) == (other.failure, other.is_kv_suspect)
        assert [token.token_id for token in one.tokens] == [token.token_id for token in other.tokens]
        assert [token.logprob for token in one.tokens] == pytest.approx([t.logprob for t in other.tokens], abs=2e-5)
        assert [pair[0] for pair in one.candidates] == [pair[0] for pair in other.candidates]
        for mine, theirs in zip(one.tokens, other.tokens, strict=True):
            assert [pair[0] for pair in mine.top_logprobs] == [pair[0] for pair in theirs.top_logprobs]
            logprobs = [logprob for _, logprob in theirs.top_logprobs]
            assert [logprob for _, logprob in mine.top_logprobs] == pytest.approx(logprobs, abs=2e-5)


EDITS = [
    LogitEdits(biases=[(3, 5.0), (7, -2.0), (999, 1.0)]),
    LogitEdits(repetition_penalty=1.8, seen_token_ids=[1, 5, 200]),
    LogitEdits(presence_penalty=0.5, frequency_penalty=0.7, output_counts=[(4, 3), (250, 1)]),
    LogitEdits(banned_token_ids=list(range(100, 300))),
    LogitEdits(allowed_mask=b"\x0f\x01"),
    LogitEdits(forced_token_ids=[17, 250]),
    LogitEdits(boosted_token_ids=[2], boost=3.0),
    LogitEdits(biases=[(9, 100.0)], repetition_penalty=0.5, seen_token_ids=[9, 10], banned_token_ids=[11]),
]

DRAWN = Warpers(temperature=1.0, top_k=50, top_p=0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_all_kinds_come_out_as_the_engines(dtype: torch.dtype):
    specs = [
        *(SampleSpec(DRAWN, seed=5, edits=edits) for edits in EDITS),
        SampleSpec(edits=EDITS[1], num_top_logprobs=5),
        SampleSpec(num_top_logprobs=20),
        SampleSpec(Warpers(temperature=1.0), seed=8, num_top_logprobs=3),
        SampleSpec(),
        SampleSpec(DRAWN, seed=6),
        SampleSpec(Warpers(temperature=1.0, typical_p=0.5), seed=7, num_top_logprobs=2),
        SampleSpec(edits=EDITS[0], num_candidates=4),
        SampleSpec(DRAWN, seed=4, guidance_scale=1.5),
    ]
    logits, unconditional = (2 * randn(len(specs), V)).to(dtype), randn(1, V, seed=1)
    positions = list(range(len(specs)))
    actual = sample_on_gpu(logits.to(DEVICE), specs, positions, unconditional.to(DEVICE))
    assert_equal(actual, sample(logits.clone(), specs, positions, unconditional))


def test_failures_stay_in_their_rows_and_say_what_they_are():
    logits = randn(6, V)
    logits[1, 0] = torch.nan
    logits[4] = -torch.inf
    specs = [
        SampleSpec(edits=EDITS[0]),
        SampleSpec(edits=EDITS[5]),
        SampleSpec(edits=LogitEdits(allowed_mask=b"\x00")),
        SampleSpec(edits=LogitEdits(biases=[(1, float("inf"))])),
        SampleSpec(num_top_logprobs=2),
        SampleSpec(DRAWN, num_top_logprobs=2),
    ]
    actual = sample_on_gpu(logits.to(DEVICE), specs, [0] * 6)
    assert [result.failure for result in actual] == [
        None,
        NOT_FINITE,
        NOTHING_POSSIBLE,
        NOT_FINITE_AFTER_EDITS,
        NOT_FINITE,
        None,
    ]
    assert_equal(actual, sample(logits.clone(), specs, [0] * 6))


def test_rows_beyond_those_of_one_part():
    specs = [SampleSpec(Warpers(temperature=1.0), seed=seed) for seed in range(MAX_ROWS_AT_ONCE + 2)]
    specs[3] = SampleSpec(num_candidates=2)
    logits = 2 * randn(len(specs), 70)
    positions = list(range(len(specs)))
    assert_equal(sample_on_gpu(logits.to(DEVICE), specs, positions), sample(logits.clone(), specs, positions))


def test_logits_are_left_as_they_were():
    logits = randn(2, V).to(DEVICE)
    before = logits.clone()
    sample_on_gpu(logits, [SampleSpec(edits=EDITS[3]), SampleSpec(num_candidates=2)], [0, 0])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("count", [1, 5, 20, V])
def test_best_tokens_are_those_of_the_engine_in_their_order(count: int):
    logits = torch.cat([(3 * randn(4, V)).round(), torch.zeros(1, V), torch.full((1, V), -0.0)])
    logits[4, ::2] = -0.0
    token_ids, scores = best_of(logits.to(DEVICE), count)
    wanted, wanted_ids = best(logits, count)
    assert token_ids.tolist() == wanted_ids.tolist()
    assert torch.equal(scores.cpu(), wanted)
