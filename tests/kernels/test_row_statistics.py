"""The sampler with our kernels' statistics: the tokens, log-probabilities and failures that it has with PyTorch's."""

import math
import random

import pytest
import torch
from torch import Tensor

from gptj_serve.engine.sampling import log_normalizers, sample
from gptj_serve.kernels.row_statistics import row_statistics
from gptj_serve.steps import LogitEdits, RowResult, SampleSpec
from gptj_serve.types import Warpers

WIDTHS = (1, 2, 15, 16, 17, 333, 50400)


def logits(num_rows: int, width: int, seed: int = 0) -> Tensor:
    """With ties, wide spreads and -inf among them."""
    generator = torch.Generator().manual_seed(seed)
    scores = 8 * torch.randn(num_rows, width, generator=generator)
    scores[::2] = scores[::2].round()
    if width > 1:
        scores[1::3, ::2] = -torch.inf
    scores[-1] *= 1e30
    return scores


@pytest.mark.parametrize("width", WIDTHS)
def test_they_are_the_rows_own(width: int) -> None:
    scores = logits(21, width)
    normalizers, best_ids = row_statistics(scores)
    assert best_ids.tolist() == scores.argmax(dim=-1).tolist()
    torch.testing.assert_close(normalizers, scores.double().logsumexp(-1, keepdim=True).float(), rtol=3e-7, atol=1e-6)
    for row in range(len(scores)):
        alone = row_statistics(scores[row : row + 1])
        assert (alone[0].item(), alone[1].item()) == (normalizers[row].item(), best_ids[row].item())


@pytest.mark.parametrize("width", [5, 16, 50400])
def test_a_view_of_wider_rows(width: int) -> None:
    scores = logits(6, width)
    wider = torch.full((6, width + 11), torch.nan)
    wider[:, :width] = scores
    for mine, theirs in zip(row_statistics(wider[:, :width]), row_statistics(scores), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(row_statistics(scores.t().contiguous().t()), row_statistics(scores), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("place", [0, 16, 301])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(place: int, value: float) -> None:
    scores = logits(8, 302)
    scores[3, place] = value
    scores[5] = -torch.inf
    normalizers, best_ids = row_statistics(scores)
    is_finite = [row not in (3, 5) for row in range(8)]
    assert normalizers[:, 0].isfinite().tolist() == log_normalizers(scores)[:, 0].isfinite().tolist() == is_finite
    assert all(0 <= token_id < 302 for token_id in best_ids.tolist())


def random_spec(rng: random.Random) -> SampleSpec:
    return SampleSpec(
        Warpers(temperature=rng.choice([0.0, 0.0, 0.7]), top_k=rng.choice([0, 1, 5]), top_p=rng.choice([1.0, 0.9])),
        seed=rng.randrange(1000),
        edits=LogitEdits(biases=[(rng.randrange(300), 20.0)]) if rng.random() < 0.2 else None,
        num_top_logprobs=rng.choice([0, 0, 3]),
        guidance_scale=rng.choice([1.0, 1.0, 1.0, 2.0]),
        num_candidates=rng.choice([0, 0, 0, 4]),
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_sampler_gives_the_same_with_them(seed: int) -> None:
    rng = random.Random(seed)
    specs = [random_spec(rng) for _ in range(rng.choice([1, 7, 130]))]
    scores = torch.randn(len(specs), 300, generator=torch.Generator().manual_seed(seed))
    scores[rng.randrange(len(specs)), 7] = torch.nan
    unconditional = torch.randn(sum(spec.guidance_scale != 1 for spec in specs), 300)
    positions = [rng.randrange(2048) for _ in specs]
    plain = sample(scores.clone(), specs, positions, unconditional)
    ours = sample(scores.clone(), specs, positions, unconditional, row_statistics)
    assert [exact(result) for result in ours] == [exact(result) for result in plain]
    assert all(map(close, ours, plain))
    assert any(result.failure for result in ours)


def exact(result: RowResult) -> tuple[object, ...]:
    tokens = [(token.token_id, [token_id for token_id, _ in token.top_logprobs]) for token in result.tokens]
    return tokens, [token_id for token_id, _ in result.candidates], result.failure, result.is_kv_suspect


def close(mine: RowResult, theirs: RowResult) -> bool:
    pairs = [(m, t) for (_, m), (_, t) in zip(mine.candidates, theirs.candidates, strict=True)]
    pairs += [(m.logprob, t.logprob) for m, t in zip(mine.tokens, theirs.tokens, strict=True)]
    for m, t in zip(mine.tokens, theirs.tokens, strict=True):
        pairs += zip((value for _, value in m.top_logprobs), (value for _, value in t.top_logprobs), strict=True)
    return all(math.isclose(m, t, rel_tol=1e-6, abs_tol=2e-6) for m, t in pairs)
