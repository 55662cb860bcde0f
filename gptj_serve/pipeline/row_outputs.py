"""`RowOutputs`: what the last stage makes of hidden states: head outputs, chosen tokens, log-probabilities.

Shapes: `T` packed tokens of a microbatch, `D` n_embd, `V` the ids that have a token.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, islice, takewhile

import torch
from torch import Tensor, nn

from gptj_serve.engine.ranking import best
from gptj_serve.engine.sampling import NOT_FINITE, Sample, Statistics, log_normalizers, sample
from gptj_serve.model.heads import HeadCheckpoint, HeadKind
from gptj_serve.model.stage import GPTJStage
from gptj_serve.steps import Row, RowOutput, RowResult
from gptj_serve.types import DEFAULT_HEAD, Matrix

MAX_SCORED_ROWS = 128
"""Rows of logits, each as wide as the vocabulary, that exist at once while targets are scored."""

Answer = Matrix | str
"""Numbers, or what is wrong with them."""


class RowOutputs:
    """The last stage's heads, and what rows can ask of them. A row whose numbers go wrong fails alone."""

    def __init__(
        self,
        stage: GPTJStage,
        num_token_ids: int,
        heads: Mapping[str, HeadCheckpoint],
        convert: Callable[[nn.Linear], nn.Module] | None = None,
        statistics: Statistics | None = None,
        sample: Sample = sample,
    ) -> None:
        """`convert` is applied to the `heads`, which are not the stage's own; `statistics` are those of logits."""
        self._sample = sample
        self._statistics = statistics
        self._stage = stage
        self._num_token_ids = num_token_ids
        self._heads: dict[tuple[RowOutput, str], nn.Module] = {}
        if hasattr(stage, "score"):
            self._heads[RowOutput.CLASSIFY, DEFAULT_HEAD] = stage.score
        if hasattr(stage, "qa_outputs"):
            self._heads[RowOutput.QA, DEFAULT_HEAD] = stage.qa_outputs
        for name, head in heads.items():
            output = RowOutput.CLASSIFY if head.info.kind is HeadKind.CLASSIFIER else RowOutput.QA
            linear = _linear(head, stage.ln_f.weight)
            self._heads[output, name] = convert(linear) if convert else linear

    def of(self, rows: Sequence[Row], hidden: Tensor) -> list[RowResult | None]:
        """One entry for each row, whose tokens have the `hidden` states [T, D], row after row."""
        ends = list(accumulate(len(row.token_ids) for row in rows))
        chosen = self._choose(rows, ends, hidden)
        targets = self._score(rows, ends, hidden)
        results: list[RowResult | None] = []
        for index, row in enumerate(rows):
            if row.output is RowOutput.NOTHING and index not in targets:
                results.append(chosen.get(index))
            else:
                values = self._values(row, hidden[ends[index] - len(row.token_ids) : ends[index]])
                results.append(_together(chosen.get(index, RowResult()), values, targets.get(index)))
        return results

    def _choose(self, rows: Sequence[Row], ends: Sequence[int], hidden: Tensor) -> dict[int, RowResult]:
        """Tokens or candidates, by row. All that is needed of the LM head's logits is computed at once."""
        specs = [spec for row in rows for spec in row.samples]
        if not specs:
            return {}
        places = [end - n for row, end in zip(rows, ends, strict=True) for n in range(len(row.samples), 0, -1)]
        positions = [row.end - n + 1 for row in rows for n in range(len(row.samples), 0, -1)]
        guided = [index for index, row in enumerate(rows) if row.samples and row.samples[0].guidance_scale != 1]
        logits = self._logits(hidden, places + [ends[index + 1] - 1 for index in guided])
        results = iter(self._sample(logits[: len(specs)], specs, positions, logits[len(specs) :], self._statistics))
        return {
            index: in_order(list(islice(results, len(row.samples)))) for index, row in enumerate(rows) if row.samples
        }

    def _score(self, rows: Sequence[Row], ends: Sequence[int], hidden: Tensor) -> dict[int, Answer]:
        """The log-probabilities of targets, by row."""
        answers: dict[int, Answer] = {}
        asking: list[int] = []
        for index, row in enumerate(rows):
            if (largest := max(row.target_token_ids, default=-1)) >= self._num_token_ids:
                answers[index] = f"token id {largest} has no logit: the model's are below {self._num_token_ids}"
            elif row.target_token_ids:
                asking.append(index)
        if not asking:
            return answers
        places: list[int] = []
        for index in asking:
            first = ends[index] - len(rows[index].token_ids) + rows[index].first_target
            places += range(first, first + len(rows[index].target_token_ids))
        targets = [token_id for index in asking for token_id in rows[index].target_token_ids]
        num_top = min(max(rows[index].num_top_targets for index in asking), self._num_token_ids)
        table = self._log_probabilities(hidden, places, targets, num_top)
        parts = torch.split(table, [len(rows[index].target_token_ids) for index in asking])
        for index, part in zip(asking, parts, strict=True):
            k = min(rows[index].num_top_targets, num_top)
            answers[index] = _checked(torch.cat([part[:, : 1 + k], part[:, 1 + num_top : 1 + num_top + k]], dim=1))
        return answers

    def _log_probabilities(self, hidden: Tensor, places: Sequence[int], targets: Sequence[int], num_top: int) -> Tensor:
        """[targets, 1 + 2 * num_top] on the CPU: the target's own, the likeliest ids, their log-probabilities."""
        parts = []
        for first in range(0, len(places), MAX_SCORED_ROWS):
            part = slice(first, first + MAX_SCORED_ROWS)
            logits = self._logits(hidden, places[part]).float()
            normalizers = self._statistics(logits)[0] if self._statistics else log_normalizers(logits)
            wanted = torch.tensor(targets[part], device=logits.device)[:, None]
            columns = [logits.gather(1, wanted) - normalizers]
            if num_top:
                top_logits, token_ids = best(logits, num_top)
                columns += [token_ids.float(), top_logits - normalizers]
            parts.append(torch.cat(columns, dim=1))
        return torch.cat(parts).cpu()

    def _logits(self, hidden: Tensor, places: Sequence[int]) -> Tensor:
        """Only of the tokens that have one: [places, V]."""
        states = hidden.index_select(0, torch.tensor(places, device=hidden.device))
        logits: Tensor = self._stage.lm_head(states)
        return logits[:, : self._num_token_ids]

    def _values(self, row: Row, hidden: Tensor) -> Answer | None:
        """Of a row's own hidden states."""
        match row.output:
            case RowOutput.CLASSIFY:
                values = self._heads[row.output, row.head](hidden[-1:])
            case RowOutput.CLASSIFY_SUM:
                values = self._heads[RowOutput.CLASSIFY, row.head](hidden).double().sum(dim=0, keepdim=True)
            case RowOutput.QA:
                values = self._heads[row.output, row.head](hidden)
            case RowOutput.HIDDEN_LAST:
                values = hidden[-1:]
            case RowOutput.HIDDEN_SUM:
                values = hidden.double().sum(dim=0, keepdim=True)
            case RowOutput.HIDDEN_ALL:
                values = hidden
            case RowOutput.NOTHING:
                return None
        return _checked(values)


def _checked(values: Tensor) -> Answer:
    """[rows, columns] for the wire."""
    values = values.float()
    return Matrix.of(values.cpu().numpy()) if values.isfinite().all() else NOT_FINITE


def in_order(results: Sequence[RowResult]) -> RowResult:
    """The results of a row's samples as one, up to the first that failed: after a wrong draft it may mean nothing."""
    if results[0].failure is not None or len(results) == 1:
        return results[0]
    sound = takewhile(lambda result: result.failure is None, results)
    return RowResult(tokens=[token for result in sound for token in result.tokens])


def _together(chosen: RowResult, values: Answer | None, targets: Answer | None) -> RowResult:
    if chosen.failure is not None:
        return chosen
    if isinstance(values, str):
        return RowResult(failure=values, is_kv_suspect=values == NOT_FINITE)
    if isinstance(targets, str):
        return RowResult(failure=targets, is_kv_suspect=targets == NOT_FINITE)
    return RowResult(chosen.tokens, chosen.candidates, values, targets)


def _linear(head: HeadCheckpoint, like: Tensor) -> nn.Linear:
    num_outputs, width = head.weight.shape
    linear = nn.Linear(width, num_outputs, bias=head.bias is not None, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(head.weight))
        if head.bias is not None:
            linear.bias.copy_(torch.from_numpy(head.bias))
    return linear.requires_grad_(False)
