"""Edits against the transformers processors that they stand for."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from gptj_serve.engine.logit_edits import apply_edits
from gptj_serve.steps import LogitEdits

V = 60
EOS = [7, 50]
HISTORY = [3, 14, 15, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 14]

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def random_scores(num_rows: int = 1, seed: int = 0) -> Tensor:
    return 4 * torch.randn(num_rows, V, generator=torch.Generator().manual_seed(seed))


def edited(scores: Tensor, edits: LogitEdits) -> Tensor:
    result = scores.clone()
    apply_edits(result, [(row, edits) for row in range(len(scores))])
    return result


def processed(processor: LogitsProcessor, scores: Tensor, history: list[int] = HISTORY) -> Tensor:
    return processor(torch.tensor([history] * len(scores)), scores.clone())


def forbidden_by(processor: LogitsProcessor, history: list[int] = HISTORY) -> list[int]:
    return processed(processor, torch.zeros(1, V), history)[0].isneginf().nonzero().flatten().tolist()


def mask_of(token_ids: list[int], num_bits: int = V) -> bytes:
    bits = np.zeros(num_bits, dtype=np.uint8)
    bits[token_ids] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------- one at a time

token_ids = st.integers(0, V - 1)
finite = st.floats(-20, 20, width=32)


@given(biases=st.dictionaries(token_ids, finite, min_size=1))
def test_biases(biases: dict[int, float]):
    scores = random_scores()
    processor = SequenceBiasLogitsProcessor([[[token_id], bias] for token_id, bias in biases.items()])
    assert_same(edited(scores, LogitEdits(biases=list(biases.items()))), processed(processor, scores))


@given(penalty=st.floats(0.125, 8, width=32))
def test_repetition_penalty(penalty: float):
    scores = random_scores()
    edits = LogitEdits(repetition_penalty=penalty, seen_token_ids=list(set(HISTORY)))
    assert_same(edited(scores, edits), processed(RepetitionPenaltyLogitsProcessor(penalty), scores))


@given(presence=finite, frequency=finite, counts=st.dictionaries(token_ids, st.integers(0, 9)))
def test_presence_and_frequency_penalties_are_openais(presence: float, frequency: float, counts: dict[int, int]):
    """https://platform.openai.com/docs/guides/text-generation: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    scores = random_scores()
    expected = scores.clone()
    for token_id, count in counts.items():
        expected[0, token_id] -= count * frequency + (count > 0) * presence
    edits = LogitEdits(presence_penalty=presence, frequency_penalty=frequency, output_counts=list(counts.items()))
    torch.testing.assert_close(edited(scores, edits), expected, rtol=1e-5, atol=1e-4)


BANS: dict[str, LogitsProcessor] = {
    "no repeated 2-gram": NoRepeatNGramLogitsProcessor(2),
    "no repeated token": NoRepeatNGramLogitsProcessor(1),
    "bad words": NoBadWordsLogitsProcessor([[3, 14, 20], [14, 21], [22], [1, 23]], eos_token_id=EOS),
    "minimum length": MinLengthLogitsProcessor(40, EOS),
    "suppressed": SuppressTokensLogitsProcessor([0, 59, 3]),
    "suppressed first": SuppressTokensAtBeginLogitsProcessor([4, 5], len(HISTORY)),
}


@pytest.mark.parametrize("processor", BANS.values(), ids=BANS.keys())
def test_bans(processor: LogitsProcessor):
    scores = random_scores()
    banned = forbidden_by(processor)
    assert 0 < len(banned) < 20
    assert_same(edited(scores, LogitEdits(banned_token_ids=banned + banned[:1])), processed(processor, scores))


@given(allowed=st.sets(token_ids, min_size=1))
def test_allowed_mask(allowed: set[int]):
    scores = random_scores()
    processor = PrefixConstrainedLogitsProcessor(lambda batch, history: list(allowed), num_beams=1)
    assert_same(edited(scores, LogitEdits(allowed_mask=mask_of(list(allowed)))), processed(processor, scores))


@pytest.mark.parametrize("num_bits", [8, 16, 56, 64, 400])
def test_a_mask_of_any_length(num_bits: int):
    """Beyond its end nothing is allowed; what it says beyond the vocabulary is left out."""
    scores = random_scores()
    allowed = edited(scores, LogitEdits(allowed_mask=b"\xff" * (num_bits // 8)))
    assert torch.equal(allowed[0, :num_bits], scores[0, :num_bits])
    assert allowed[0, num_bits:].isneginf().all()


@pytest.mark.parametrize(
    ("processor", "history", "forced"),
    [
        (ForcedBOSTokenLogitsProcessor(12), [3], [12]),
        (ForcedEOSTokenLogitsProcessor(len(HISTORY) + 1, EOS), HISTORY, EOS),
    ],
    ids=["begin", "end"],
)
def test_forced(processor: LogitsProcessor, history: list[int], forced: list[int]):
    scores = random_scores()
    assert_same(edited(scores, LogitEdits(forced_token_ids=forced)), processed(processor, scores, history))


@pytest.mark.parametrize("factor", [0.5, 1.01, 1.5])
@pytest.mark.parametrize("num_over", [1, 5, 16])
def test_exponential_decay(factor: float, num_over: int):
    scores = random_scores(seed=num_over)
    scores[0, EOS[1]] = -math.inf  # as a ban leaves it
    processor = ExponentialDecayLengthPenalty((len(HISTORY) - 1 - num_over, factor), EOS, input_ids_seq_length=1)
    edits = LogitEdits(boosted_token_ids=EOS, boost=factor**num_over - 1)
    assert_same(edited(scores, edits), processed(processor, scores))


@pytest.mark.parametrize("boost", [1e29, 1e200, math.inf])
@pytest.mark.parametrize("score", [0.0, -3.0, 3.0])
def test_a_huge_boost_stays_finite(boost: float, score: float):
    scores = torch.full((1, V), score)
    result = edited(scores, LogitEdits(boosted_token_ids=[7], boost=boost))
    assert result.isfinite().all()
    assert result[0, 7] >= scores[0, 7]


# ---------------------------------------------------------------------------------------------------- together


@st.composite
def edit_cases(draw: st.DrawFn) -> tuple[list[LogitsProcessor], LogitEdits]:
    """Any subset of the edits, and the processors that they stand for, in transformers' order."""
    processors: list[LogitsProcessor] = []
    fields: dict[str, Any] = {}
    if draw(st.booleans()):
        biases = draw(st.dictionaries(token_ids, finite, min_size=1, max_size=10))
        processors.append(SequenceBiasLogitsProcessor([[[token_id], bias] for token_id, bias in biases.items()]))
        fields["biases"] = list(biases.items())
    if draw(st.booleans()):
        penalty = draw(st.floats(0.5, 2, width=32))
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        fields |= {"repetition_penalty": penalty, "seen_token_ids": list(set(HISTORY))}
    bans = draw(st.lists(st.sampled_from(list(BANS.values())), unique_by=id, max_size=4))
    processors += bans
    fields["banned_token_ids"] = [token_id for ban in bans for token_id in forbidden_by(ban)]
    if draw(st.booleans()):
        allowed = draw(st.sets(token_ids, min_size=V // 2))
        processors.append(PrefixConstrainedLogitsProcessor(lambda batch, history: list(allowed), num_beams=1))
        fields["allowed_mask"] = mask_of(list(allowed))
    if draw(st.integers(0, 4)) == 0:
        processors.append(ForcedEOSTokenLogitsProcessor(len(HISTORY) + 1, EOS))
        fields["forced_token_ids"] = EOS
    if draw(st.booleans()):
        factor = draw(st.floats(1, 1.5, width=32))
        processors.append(ExponentialDecayLengthPenalty((len(HISTORY) - 4, factor), EOS, input_ids_seq_length=1))
        fields |= {"boosted_token_ids": EOS, "boost": factor**3 - 1}
    return processors, LogitEdits(**fields)


@given(cases=st.lists(edit_cases(), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_rows_with_any_edits_equal_transformers(cases: list[tuple[list[LogitsProcessor], LogitEdits]], seed: int):
    """Every other row has none, and stays as it is."""
    scores = random_scores(2 * len(cases), seed)
    actual = scores.clone()
    apply_edits(actual, [(2 * i, edits) for i, (_, edits) in enumerate(cases)])
    for i, (processors, _) in enumerate(cases):
        expected = processed(LogitsProcessorList(processors), scores[2 * i : 2 * i + 1])
        assert_same(actual[2 * i], expected[0])
        assert torch.equal(actual[2 * i + 1], scores[2 * i + 1])


def test_ids_beyond_the_logits_are_left_out():
    scores = random_scores()
    inside = LogitEdits(
        biases=[(3, 1.5)],
        repetition_penalty=1.3,
        seen_token_ids=[4, 5],
        presence_penalty=0.5,
        frequency_penalty=0.25,
        output_counts=[(6, 2)],
        banned_token_ids=[8],
        boosted_token_ids=[9],
        boost=0.5,
    )
    around = LogitEdits(
        biases=[(V, 7.0), (3, 1.5), (2**31 - 1, 7.0)],
        repetition_penalty=1.3,
        seen_token_ids=[V, 4, 5, V + 9],
        presence_penalty=0.5,
        frequency_penalty=0.25,
        output_counts=[(V, 1), (6, 2), (10**6, 3)],
        banned_token_ids=[V + 1, 8, V],
        boosted_token_ids=[V, 9],
        boost=0.5,
    )
    assert torch.equal(edited(scores, around), edited(scores, inside))
    assert edited(scores, LogitEdits(forced_token_ids=[V, 2]))[0].isfinite().nonzero().tolist() == [[2]]
    assert edited(scores, LogitEdits(forced_token_ids=[V])).isneginf().all()


def test_edits_that_ask_for_nothing_change_nothing():
    scores = random_scores()
    assert torch.equal(edited(scores, LogitEdits()), scores)
    idle = LogitEdits(repetition_penalty=2.0, presence_penalty=1.0, boost=3.0, boosted_token_ids=[], seen_token_ids=[])
    assert torch.equal(edited(scores, idle), scores)
