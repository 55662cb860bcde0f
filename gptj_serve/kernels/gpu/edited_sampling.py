"""`sample_on_gpu`: `engine.sampling.sample` for logits that lie on a GPU, for which the host waits once.

Rows that kernels can choose for (`has_kernels`) go through them, after their edits; the best tokens that a row wants
told are found beside them. What comes of all rows is copied together. The other rows are the engine's, which waits for
the device at each turn.

Shapes: `N` sample points, `V` tokens, `C` rows that are edited, `K` best tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptj_serve.engine.logit_edits import apply_edits, on_device
from gptj_serve.engine.sampling import NOT_FINITE, NOT_FINITE_AFTER_EDITS, NOTHING_POSSIBLE, Statistics, sample
from gptj_serve.kernels.gpu import draw_kernels
from gptj_serve.kernels.gpu.sampling import DeviceSampler
from gptj_serve.kernels.gpu.sampling_parameters import Field, SamplingMode, has_kernels
from gptj_serve.steps import RowResult, SampledToken, SampleSpec
from gptj_serve.types import TokenLogprob

_ALIGNMENT = 16  # tokens: rows that begin and end at a multiple of so many are read 16 bytes at a time
MAX_ROWS_AT_ONCE = 64
"""What is computed of a row takes some dozens of bytes for each token of the vocabulary, until the next rows' is."""

_GREEDY = SampleSpec()


def sample_on_gpu(
    logits: Tensor,
    specs: Sequence[SampleSpec],
    positions: Sequence[int],
    unconditional: Tensor | None = None,
    statistics: Statistics | None = None,
) -> list[RowResult]:
    """As `engine.sampling.sample`; `logits` [N, V] stay as they are. Tokens are the same, also in every tie."""
    ours = [row for row, spec in enumerate(specs) if has_kernels(spec)]
    parts = [ours[first : first + MAX_ROWS_AT_ONCE] for first in range(0, len(ours), MAX_ROWS_AT_ONCE)]
    pending = [
        _Pending(logits[_index(rows, logits)], [specs[row] for row in rows], [positions[row] for row in rows])
        for rows in parts
    ]
    results: dict[int, RowResult] = {}
    others = [row for row, spec in enumerate(specs) if not has_kernels(spec)]
    if others:
        found = sample(
            logits[_index(others, logits)],
            [specs[row] for row in others],
            [positions[row] for row in others],
            unconditional,
            statistics,
        )
        results = dict(zip(others, found, strict=True))
    for rows, part in zip(parts, pending, strict=True):
        results |= dict(zip(rows, part.results(), strict=True))
    return [results[row] for row in range(len(specs))]


@dataclass(frozen=True, slots=True)
class _OnHost:
    """Copies on their way."""

    tensors: list[Tensor]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "_OnHost":
        is_pinned = any(tensor.is_cuda for tensor in tensors)
        copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned) for tensor in tensors]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        return cls(copies)


class _Pending:
    """What the device was given to do for some rows."""

    def __init__(self, logits: Tensor, specs: Sequence[SampleSpec], positions: Sequence[int]) -> None:
        self._specs = specs
        self._edited = [row for row, spec in enumerate(specs) if spec.edits is not None]
        self._told = [row for row, spec in enumerate(specs) if spec.num_top_logprobs]
        plain = [_GREEDY if spec.edits is not None else spec for spec in specs]
        table, normalizers = _choose(logits, plain, positions)
        found = [table]
        if self._edited:
            found += self._choose_edited(logits, normalizers, positions)
        if self._told:
            num_best = min(max(spec.num_top_logprobs for spec in specs), logits.shape[1])
            index = _index(self._told, logits)
            token_ids, scores = best_of(logits[index], num_best)
            found += [token_ids, scores - normalizers[index][:, None]]
        self._on_host = _OnHost.of(found)
        self._is_done = None
        if logits.is_cuda:
            self._is_done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._is_done.record(torch.cuda.current_stream(logits.device))

    def _choose_edited(self, logits: Tensor, normalizers: Tensor, positions: Sequence[int]) -> list[Tensor]:
        """The table of the edited rows, and the log-probabilities [C] of their tokens before the edits."""
        specs = [self._specs[row] for row in self._edited]
        index = _index(self._edited, logits)
        raw = logits[index].float()
        scores = raw.clone()
        apply_edits(scores, [(place, spec.edits) for place, spec in enumerate(specs) if spec.edits is not None])
        table, _ = _choose(scores, specs, [positions[row] for row in self._edited])
        return [table, raw.gather(1, table[0].long()[:, None])[:, 0] - normalizers[index]]

    def results(self) -> list[RowResult]:
        if self._is_done is not None:
            self._is_done.synchronize()
        table, *more = self._on_host.tensors
        chosen, statuses = _tokens(table), table[2].tolist()
        failures = {row: NOT_FINITE for row, status in enumerate(statuses) if status != draw_kernels.OK}
        if self._edited:
            edited, logprobs, *more = more
            parts = zip(self._edited, edited[0].tolist(), logprobs.tolist(), edited[2].tolist(), strict=True)
            for row, token_id, logprob, status in parts:
                chosen[row] = (token_id, logprob)
                if status != draw_kernels.OK:
                    is_finite = status == draw_kernels.NOTHING_POSSIBLE
                    failures.setdefault(row, NOTHING_POSSIBLE if is_finite else NOT_FINITE_AFTER_EDITS)
        alternatives = self._alternatives(*more) if self._told else {}
        return [
            RowResult(failure=failures[row], is_kv_suspect=failures[row] == NOT_FINITE)
            if row in failures
            else RowResult([SampledToken(*token, alternatives.get(row, []))])
            for row, token in enumerate(chosen)
        ]

    def _alternatives(self, token_ids: Tensor, logprobs: Tensor) -> dict[int, list[TokenLogprob]]:
        found = {}
        for row, ids, values in zip(self._told, token_ids.tolist(), logprobs.tolist(), strict=True):
            pairs = list(zip(ids, values, strict=True))[: self._specs[row].num_top_logprobs]
            found[row] = [(token_id, logprob) for token_id, logprob in pairs if logprob > float("-inf")]
        return found


def best_of(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(ids, fp32 scores), each [N, K], of the best tokens, the lower id first among equals, without waiting.

    As `ranking.best`, but one order of integers has both: the score's, and below it the id's, backwards.
    """
    num_token_ids = logits.shape[1]
    scores = logits.float()
    bits = scores.view(torch.int32)
    keys = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits).long()
    ids = torch.arange(num_token_ids, device=logits.device)
    ranked = ((keys << 32) + (num_token_ids - 1 - ids)).topk(count).values
    token_ids = num_token_ids - 1 - (ranked & 0xFFFFFFFF)
    return token_ids, scores.gather(1, token_ids)


def _choose(logits: Tensor, specs: Sequence[SampleSpec], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """As `DeviceSampler`. Rows are made as long as its kernels want them, and all are chosen for as if they were
    narrowed: that takes little longer, and no more kernels than a service has."""
    num_token_ids = logits.shape[1]
    padded = F.pad(logits, (0, -num_token_ids % _ALIGNMENT))
    sampler = DeviceSampler()
    table = np.empty((len(Field), len(specs)), dtype=np.int64)
    sampler.write(torch.from_numpy(table), specs, positions)
    parameters = on_device(table, logits.device)
    return sampler.sample_and_normalize(padded, num_token_ids, parameters, SamplingMode.NARROWED)


def _tokens(table: Tensor) -> list[tuple[int, float]]:
    return list(zip(table[0].tolist(), table[1].view(torch.float32).tolist(), strict=True))


def _index(rows: Sequence[int], like: Tensor) -> Tensor:
    return on_device(np.array(rows), like.device)
