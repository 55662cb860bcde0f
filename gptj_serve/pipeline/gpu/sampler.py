"""`Sampler`: the choice of tokens on the device, in graphs of its own. `GreedySampler` needs no kernels.

Shapes: `S` places with logits, `W` logits of each, of which the first `num_token_ids` belong to tokens.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gptj_serve.engine.sampling import NOT_FINITE, NOTHING_POSSIBLE
from gptj_serve.steps import RowResult, SampledToken, SampleSpec

STATUS_OK, STATUS_NOT_FINITE, STATUS_NOTHING_POSSIBLE = range(3)

_FAILURES = {STATUS_NOT_FINITE: NOT_FINITE, STATUS_NOTHING_POSSIBLE: NOTHING_POSSIBLE}


class Sampler(Protocol):
    @property
    def modes(self) -> Sequence[int]:
        """What rows may ask for together, each more than the one before; each has graphs of its own."""

    @property
    def num_fields(self) -> int:
        """Numbers of 64 bits that describe a row."""

    def can_sample(self, spec: SampleSpec) -> bool: ...

    def write(self, parameters: Tensor, specs: Sequence[SampleSpec], positions: Sequence[int]) -> int:
        """Describe the rows in pinned int64 `parameters` [num_fields, S]; → the least mode that serves them."""

    def sample(self, logits: Tensor, num_token_ids: int, parameters: Tensor, mode: int) -> Tensor:
        """Logits [S, W] → int32 [3, S]: token ids, the bits of their fp32 log-probabilities, and statuses."""


class GreedySampler:
    """The best token of each row, the lowest id among equals, in a few passes over the logits."""

    modes = (0,)
    num_fields = 0

    def can_sample(self, spec: SampleSpec) -> bool:
        is_greedy = spec.warpers.temperature == 0 or spec.warpers.top_k == 1
        is_plain = spec.edits is None and spec.guidance_scale == 1
        return is_greedy and is_plain and not spec.num_candidates and not spec.num_top_logprobs

    def write(self, parameters: Tensor, specs: Sequence[SampleSpec], positions: Sequence[int]) -> int:
        return 0

    def sample(self, logits: Tensor, num_token_ids: int, parameters: Tensor, mode: int) -> Tensor:
        scores = logits[:, :num_token_ids].float()
        peaks = scores.amax(dim=-1, keepdim=True)
        ids = torch.arange(num_token_ids, dtype=torch.int32, device=scores.device)
        token_ids = torch.where(scores == peaks, ids, num_token_ids).amin(dim=-1)
        normalizers = scores.logsumexp(dim=-1)
        is_sound = normalizers.isfinite()
        logprobs = (peaks[:, 0] - normalizers).view(torch.int32)
        statuses = torch.where(is_sound, STATUS_OK, STATUS_NOT_FINITE).int()
        return torch.stack((torch.where(is_sound, token_ids, 0).int(), logprobs, statuses))


def row_results(table: Tensor) -> list[RowResult]:
    """Of a sampler's table [3, S], on the host."""
    token_ids, _, statuses = table.tolist()
    logprobs = table[1].view(torch.float32).tolist()
    return [
        RowResult([SampledToken(token_id, logprob)])
        if status == STATUS_OK
        else RowResult(failure=_FAILURES[status], is_kv_suspect=status == STATUS_NOT_FINITE)
        for token_id, logprob, status in zip(token_ids, logprobs, statuses, strict=True)
    ]
