"""The sampler: from logits to tokens or, for a beam search, to candidates.

Guidance, then `LogitEdits`, then the choice: greedy, or drawn from what the `Warpers` leave. All rows are worked on at
once, and each comes out as if it were alone. Shapes: `N` sample points, `V` tokens.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptj_serve.engine.draws import draw, draw_ranked, first_best, noise_for
from gptj_serve.engine.logit_edits import apply_edits
from gptj_serve.engine.ranking import best, rows_where, take_rows
from gptj_serve.engine.warpers import Knobs, narrowed
from gptj_serve.steps import RowResult, SampledToken, SampleSpec
from gptj_serve.types import TokenLogprob

NOT_FINITE = "the model's numbers are not finite: NaN or infinity"
NOT_FINITE_AFTER_EDITS = "the request's biases, penalties or guidance turn scores into NaN or infinity"
NOTHING_POSSIBLE = "no token is possible: the request's constraints, taken together, forbid all of them"

ROWS_AT_ONCE = 128
"""On a CPU: larger intermediates would be new memory each time, which costs more than what is computed in it."""


Statistics = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Scores [N, V] → rows' logarithms of the sum of exp [N, 1], and their best tokens [N], the lowest id among equals.

The former is not finite where a score is NaN or positive infinity, or all are negative infinity: the latter is any
one then.
"""

Sample = Callable[[Tensor, Sequence[SampleSpec], Sequence[int], Tensor | None, Statistics | None], Sequence[RowResult]]
"""What `sample` is, or does the same elsewhere."""


def sample(
    logits: Tensor,
    specs: Sequence[SampleSpec],
    positions: Sequence[int],
    unconditional: Tensor | None = None,
    statistics: Statistics | None = None,
) -> list[RowResult]:
    """One token, or candidates, or a failure, for each row of `logits` [N, V], which are used up.

    `positions` are those that the new tokens take. `unconditional` [guided, V] has the unconditional logits of the
    specs with guidance, in their order. Beams without any candidate don't fail: others of the search may go on.
    With `statistics`, a row that asks for nothing but its best token takes no more than them.
    """
    results = []
    rows_at_once = ROWS_AT_ONCE if logits.device.type == "cpu" else len(specs)
    num_guided = 0
    for first in range(0, len(specs), rows_at_once):
        part = slice(first, first + rows_at_once)
        guided = slice(num_guided, num_guided + sum(spec.guidance_scale != 1 for spec in specs[part]))
        base = unconditional[guided].float() if unconditional is not None else None
        scores = logits[part].float()
        if statistics is None:
            results += _sample(scores, specs[part], positions[part], base, log_normalizers(scores))
        else:
            results += _sample_with(statistics, scores, specs[part], positions[part], base)
        num_guided = guided.stop
    return results


def _sample_with(
    statistics: Statistics,
    scores: Tensor,
    specs: Sequence[SampleSpec],
    positions: Sequence[int],
    unconditional: Tensor | None,
) -> list[RowResult]:
    normalizers, best_ids = statistics(scores)
    logprobs = scores.gather(1, best_ids[:, None]) - normalizers
    results = [
        RowResult([SampledToken(token_id, logprob)])
        if math.isfinite(normalizer)
        else RowResult(failure=NOT_FINITE, is_kv_suspect=True)
        for token_id, logprob, normalizer in zip(
            best_ids.tolist(), logprobs[:, 0].tolist(), normalizers[:, 0].tolist(), strict=True
        )
    ]
    rows = [row for row, spec in enumerate(specs) if not _asks_for_the_best_alone(spec)]
    if rows:
        others = _sample(
            take_rows(scores, rows),
            [specs[row] for row in rows],
            [positions[row] for row in rows],
            unconditional,
            normalizers[rows],
        )
        for row, result in zip(rows, others, strict=True):
            results[row] = result
    return results


def _asks_for_the_best_alone(spec: SampleSpec) -> bool:
    is_greedy = spec.warpers.temperature == 0 or spec.warpers.top_k == 1
    return is_greedy and not spec.num_top_logprobs and not _changes_scores(spec)


def _sample(
    scores: Tensor,
    specs: Sequence[SampleSpec],
    positions: Sequence[int],
    unconditional: Tensor | None,
    normalizers: Tensor,
) -> list[RowResult]:
    is_sound = normalizers[:, 0].isfinite()
    alternatives = _best(scores, [spec.num_top_logprobs for spec in specs], normalizers)
    changed = [row for row, spec in enumerate(specs) if _changes_scores(spec)]
    if changed:
        raw = scores[changed]
        _change(scores, is_sound, specs, normalizers, unconditional)
    failures = _failures(is_sound, scores, specs, changed)
    candidates = _best(scores, [spec.num_candidates for spec in specs])
    chosen = _choose(scores, specs, positions)[:, None]
    logprobs = scores.gather(1, chosen) - normalizers
    if changed:
        logprobs[changed] = raw.gather(1, chosen[changed]) - normalizers[changed]
    results = []
    for row, (token_id, logprob) in enumerate(zip(chosen[:, 0].tolist(), logprobs[:, 0].tolist(), strict=True)):
        if row in failures:
            results.append(RowResult(failure=failures[row], is_kv_suspect=failures[row] == NOT_FINITE))
        elif row in candidates:
            results.append(RowResult(candidates=candidates[row]))
        else:
            results.append(RowResult([SampledToken(token_id, logprob, alternatives.get(row, []))]))
    return results


def log_normalizers(scores: Tensor) -> Tensor:
    """Rows' logarithms of the sum of exp, [N, 1], each bit of which depends on the row alone.

    torch cuts the sum of a lone row of many numbers into one part for each thread, and leaves those of two rows whole.
    """
    return scores.expand(max(2, len(scores)), -1).logsumexp(dim=-1, keepdim=True)[: len(scores)]


def _changes_scores(spec: SampleSpec) -> bool:
    return spec.edits is not None or spec.num_candidates > 0 or spec.guidance_scale != 1


def _change(
    scores: Tensor, is_sound: Tensor, specs: Sequence[SampleSpec], normalizers: Tensor, unconditional: Tensor | None
) -> None:
    """Guidance, log-probabilities for beams, then edits, all in place; also what guidance finds unsound.

    Guidance is that of transformers' `UnbatchedClassifierFreeGuidanceLogitsProcessor`.
    """
    if rows := [row for row, spec in enumerate(specs) if spec.num_candidates or spec.guidance_scale != 1]:
        scores[rows] -= normalizers[rows]
    if rows := [row for row, spec in enumerate(specs) if spec.guidance_scale != 1]:
        assert unconditional is not None, "guidance needs unconditional logits"
        base = unconditional.log_softmax(dim=-1)
        is_sound[rows] &= base.amax(dim=-1).isfinite()
        scale = torch.tensor([[specs[row].guidance_scale] for row in rows], device=scores.device)
        scores[rows] = scale * (scores[rows] - base) + base
    apply_edits(scores, [(row, spec.edits) for row, spec in enumerate(specs) if spec.edits is not None])


def _failures(is_sound: Tensor, scores: Tensor, specs: Sequence[SampleSpec], changed: Sequence[int]) -> dict[int, str]:
    """What is wrong, by row."""
    failures = dict.fromkeys(rows_where(~is_sound), NOT_FINITE)
    peaks = take_rows(scores, changed).amax(dim=-1).tolist() if changed else []
    for row, peak in zip(changed, peaks, strict=True):
        if peak == -math.inf and not specs[row].num_candidates:
            failures.setdefault(row, NOTHING_POSSIBLE)
        elif not math.isfinite(peak) and peak != -math.inf:
            failures.setdefault(row, NOT_FINITE_AFTER_EDITS)
    return failures


def _best(scores: Tensor, counts: Sequence[int], normalizers: Tensor | None = None) -> dict[int, list[TokenLogprob]]:
    """The best tokens of the rows with a count, so many of them at most, best first, finite ones only."""
    rows = [row for row, count in enumerate(counts) if count]
    if not rows:
        return {}
    values, token_ids = best(take_rows(scores, rows), max(counts))
    if normalizers is not None:
        values = values - normalizers[rows]
    found = {}
    for row, ids, logprobs in zip(rows, token_ids.tolist(), values.tolist(), strict=True):
        pairs = zip(ids[: counts[row]], logprobs, strict=False)
        found[row] = [(token_id, logprob) for token_id, logprob in pairs if logprob > -math.inf]
    return found


def _choose(scores: Tensor, specs: Sequence[SampleSpec], positions: Sequence[int]) -> Tensor:
    """A token id for each row [N]; any id where candidates are asked for or the scores are not sound."""
    chosen = torch.zeros(len(specs), dtype=torch.long, device=scores.device)
    knobs = Knobs.of([spec.warpers for spec in specs])
    asks = torch.tensor([spec.num_candidates == 0 for spec in specs])
    if greedy := rows_where(asks & ~knobs.is_drawn):
        chosen[greedy] = first_best(take_rows(scores, greedy))
    if drawn := rows_where(asks & knobs.is_drawn):
        seeds = [specs[row].seed for row in drawn]
        noise = noise_for(scores.shape[1], seeds, [positions[row] for row in drawn], scores.device)
        chosen[drawn] = _draw(take_rows(scores, drawn), knobs.of_rows(drawn), noise)
    return chosen


def _draw(scores: Tensor, knobs: Knobs, noise: Tensor) -> Tensor:
    """Scores [R, V] and their noise → token ids [R]."""
    chosen = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    is_narrowed = knobs.narrows(scores.shape[1])
    if whole := rows_where(~is_narrowed):
        temperatures = knobs.of_rows(whole).temperatures(scores)
        chosen[whole] = draw(take_rows(scores, whole), temperatures, noise[whole])
    if cut := rows_where(is_narrowed):
        for part in narrowed(take_rows(scores, cut), knobs.of_rows(cut)):
            rows = [cut[row] for row in part.rows]
            chosen[rows] = draw_ranked(part.x, part.token_ids, noise[rows])
    return chosen
