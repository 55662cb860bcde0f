"""`sample_rows`: tokens from logits on a GPU, without the host waiting for anything.

Per row it reads the logits once for a greedy choice, twice for a draw and three times for top-k or top-p, and but for
the first time they are in the cache. So R rows of V logits of b bytes take at least R * V * b / bandwidth, and with few
rows the time that the two to four launches take. Under a captured graph, that is what is between them.

Shapes: `R` rows, `W` logits of a row, of which the first `V` belong to tokens, `F` fields of the parameters.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from gptj_serve.engine.draws import GROUP_SIZE
from gptj_serve.kernels.gpu.draw_kernels import choose, measure, weigh
from gptj_serve.kernels.gpu.narrowing_kernel import narrow
from gptj_serve.kernels.gpu.sampling_parameters import Field, SamplingMode

CHUNK_GROUPS = 32
"""Groups of tokens in a chunk: some 25 programs for a row of GPT-J's, each of which reads 4 or 8 KB."""

SEARCH_TILE = 2048
NUM_PIVOTS = 4

_SHIFTS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""So many low bits are 0 in each number of the type, as fp32."""


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What came of the rows, in one tensor, so that it takes one copy to get it."""

    table: Tensor  # [3, R] int32

    @classmethod
    def empty(cls, num_rows: int, device: torch.device | None = None, is_pinned: bool = False) -> "SampledRows":
        return cls(torch.empty(3, num_rows, dtype=torch.int32, device=device, pin_memory=is_pinned))

    @property
    def token_ids(self) -> Tensor:
        """[R]; 0 if the status is not OK."""
        return self.table[0]

    @property
    def logprobs(self) -> Tensor:
        """[R] fp32, of the chosen tokens among all of the row's."""
        return self.table[1].view(torch.float32)

    @property
    def statuses(self) -> Tensor:
        """[R]: `draw_kernels.OK`, `NOT_FINITE` or `NOTHING_POSSIBLE`."""
        return self.table[2]


def sample_rows(logits: Tensor, num_token_ids: int, parameters: Tensor, mode: SamplingMode) -> SampledRows:
    """Enqueue the choice of one token for each row of `logits` [R, W], whose `parameters` [F, R] lie on the device too.

    Tokens are those that `engine.sampling.sample` chooses. `mode` is at least the one `write_parameters` gave.
    Nothing is kept from one call to the next, so it may be captured in a graph.
    """
    num_rows, width = logits.shape
    assert parameters.shape == (len(Field), num_rows) and parameters.is_contiguous()  # noqa: PT018
    assert logits.stride(1) == 1 and num_token_ids <= width  # noqa: PT018
    shift = _SHIFTS[logits.dtype]
    num_groups = -(-num_token_ids // GROUP_SIZE)
    num_chunks = -(-num_groups // CHUNK_GROUPS)
    padded_chunks = triton.next_power_of_2(num_chunks)
    draws, narrows = mode >= SamplingMode.DRAWN, mode >= SamplingMode.NARROWED
    row = (logits, logits.stride(0), width, num_token_ids)
    numbers, reals = parameters, parameters.view(torch.float64)

    def parts(count: int, dtype: torch.dtype, is_needed: bool = True) -> Tensor:
        return torch.empty(num_rows if is_needed else 1, count, dtype=dtype, device=logits.device)

    peaks, sums = parts(num_chunks, torch.float32), parts(num_chunks, torch.float32)
    best_ids = parts(num_chunks, torch.int32)
    warm_sums = parts(num_chunks, torch.float32, narrows)
    maxima = parts(num_groups, torch.int32, narrows)
    thresholds, last_tied_ids = parts(1, torch.int32, narrows), parts(1, torch.int32, narrows)
    values, best_groups = parts(num_chunks, torch.float64, draws), parts(num_chunks, torch.int32, draws)
    sampled = SampledRows.empty(num_rows, logits.device)
    measure[num_rows, num_chunks](
        *row, reals, num_rows, peaks, best_ids, sums, warm_sums, maxima, num_groups,
        CHUNK_GROUPS=CHUNK_GROUPS, SHIFT=shift, NARROWS=narrows, num_warps=4,
    )  # fmt: skip
    if narrows:
        candidates = parts(num_token_ids, torch.int32)
        narrow[num_rows,](
            *row, numbers, reals, num_rows, peaks, warm_sums, maxima, num_groups, num_chunks, candidates, thresholds,
            last_tied_ids, PADDED_CHUNKS=padded_chunks, SHIFT=shift, TILE=SEARCH_TILE, NUM_PIVOTS=NUM_PIVOTS,
            num_warps=8,
        )  # fmt: skip
    if draws:
        weigh[num_rows, num_chunks](
            *row, numbers, reals, num_rows, peaks, thresholds, last_tied_ids, values, best_groups, num_groups,
            CHUNK_GROUPS=CHUNK_GROUPS, PADDED_CHUNKS=padded_chunks, SHIFT=shift, NARROWS=narrows, num_warps=4,
        )  # fmt: skip
    choose[num_rows,](
        *row, numbers, reals, num_rows, peaks, best_ids, sums, thresholds, last_tied_ids, values, best_groups,
        num_groups, num_chunks, sampled.token_ids, sampled.logprobs, sampled.statuses,
        PADDED_CHUNKS=padded_chunks, SHIFT=shift, DRAWS=draws, NARROWS=narrows, num_warps=2,
    )  # fmt: skip
    return sampled
