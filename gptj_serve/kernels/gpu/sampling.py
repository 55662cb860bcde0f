"""`DeviceSampler`: tokens from logits on a GPU, without the host waiting for anything.

Per row it reads the logits once for a greedy choice, twice for draws and three to five times for top-k or top-p; but
for the first time they are in the cache. So R rows of V logits of b bytes take at least R * V * b / bandwidth (rows of
GPT-J in bf16: 0.1 MB each), and few rows what two to four small launches take.

Shapes: `R` rows, `W` logits of a row, of which the first `V` belong to tokens, `F` fields of the parameters.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from gptj_serve.engine.draws import GROUP_SIZE
from gptj_serve.kernels.gpu.draw_kernels import choose, measure, weigh
from gptj_serve.kernels.gpu.narrowing_kernel import narrow
from gptj_serve.kernels.gpu.sampling_parameters import Field, SamplingMode, can_sample_on_device, write_parameters
from gptj_serve.steps import SampleSpec

CHUNK_GROUPS = 32
"""Groups of tokens in a chunk: 25 programs for a row of GPT-J's, each of which reads 4 or 8 KB."""

ROW_TILE = 8192
"""Tokens that are looked at together where a program passes over its whole row."""

SEARCH_TILE = 2048
"""The same, where it searches among those that can matter."""

NUM_PIVOTS = 4
"""Of a round of that search: more make fewer rounds, each of which computes more."""

NUM_WARPS = {"measure": 4, "narrow": 8, "weigh": 4, "choose": 2}

SHIFTS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""So many low bits are 0 in each number of the type, as fp32."""


class DeviceSampler:
    """Nothing is kept from one call to the next: calls may be captured in graphs, and lie in any number of streams."""

    modes = tuple(SamplingMode)
    """Each also serves rows that ask for what those before it do, with the same results in every bit."""

    num_fields = len(Field)

    def can_sample(self, spec: SampleSpec) -> bool:
        return can_sample_on_device(spec)

    def write(self, parameters: Tensor, specs: Sequence[SampleSpec], positions: Sequence[int]) -> SamplingMode:
        """Describe rows in `parameters` [F, R] on the host: see `write_parameters`."""
        return write_parameters(parameters, specs, positions)

    def sample(self, logits: Tensor, num_token_ids: int, parameters: Tensor, mode: int) -> Tensor:
        """Enqueue the choice of a token for each row of `logits` [R, W], whose `parameters` [F, R] int64 lie beside
        them → int32 [3, R]: token ids, bits of their fp32 log-probabilities, statuses (see `draw_kernels`).

        They are the tokens that `engine.sampling.sample` chooses. Where the status is not OK, the first two are 0.
        """
        return self.sample_and_normalize(logits, num_token_ids, parameters, mode)[0]

    def sample_and_normalize(
        self, logits: Tensor, num_token_ids: int, parameters: Tensor, mode: int
    ) -> tuple[Tensor, Tensor]:
        """Also the rows' logarithms of the sum of exp, fp32 [R]; of sound rows only."""
        return _Call(logits, num_token_ids, parameters).sample(SamplingMode(mode))


class _Call:
    def __init__(self, logits: Tensor, num_token_ids: int, parameters: Tensor) -> None:
        self._num_rows, width = logits.shape
        assert parameters.shape == (len(Field), self._num_rows)
        assert parameters.is_contiguous()
        assert logits.stride(1) == 1
        assert 0 < num_token_ids <= width
        self._device = logits.device
        self._num_token_ids = num_token_ids
        self._shift = SHIFTS[logits.dtype]
        self._row = (logits, logits.stride(0), width, num_token_ids)
        self._reals = (parameters.view(torch.float64), self._num_rows)
        self._parameters = (parameters, *self._reals)
        self._num_groups = -(-num_token_ids // GROUP_SIZE)
        self._num_chunks = -(-self._num_groups // CHUNK_GROUPS)

    def sample(self, mode: SamplingMode) -> tuple[Tensor, Tensor]:
        draws, narrows = mode >= SamplingMode.DRAWN, mode >= SamplingMode.NARROWED
        num_groups, num_chunks = self._num_groups, self._num_chunks
        shift, padded_chunks = self._shift, triton.next_power_of_2(num_chunks)
        per_chunk, per_row = (self._num_rows, num_chunks), (self._num_rows,)
        peaks, sums = self._new(num_chunks, torch.float32), self._new(num_chunks, torch.float32)
        best_ids = self._new(num_chunks, torch.int32)
        warm_sums = self._new(num_chunks, torch.float32, narrows)
        maxima = self._new(num_groups, torch.int32, narrows)
        kept = (self._new(1, torch.int32, narrows), self._new(1, torch.int32, narrows))
        drawn = (self._new(num_chunks, torch.float64, draws), self._new(num_chunks, torch.int32, draws))
        sampled = torch.empty(3, self._num_rows, dtype=torch.int32, device=self._device)
        normalizers = torch.empty(self._num_rows, dtype=torch.float32, device=self._device)
        measure[per_chunk](
            *self._row, *self._reals, peaks, best_ids, sums, warm_sums, maxima, num_groups,
            CHUNK_GROUPS=CHUNK_GROUPS, SHIFT=shift, NARROWS=narrows, num_warps=NUM_WARPS["measure"],
        )  # fmt: skip
        if narrows:
            candidates = self._new(self._num_token_ids, torch.int32)
            narrow[per_row](
                *self._row, *self._parameters, peaks, warm_sums, maxima, num_groups, num_chunks, candidates, *kept,
                PADDED_CHUNKS=padded_chunks, SHIFT=shift, ROW_TILE=ROW_TILE, TILE=SEARCH_TILE, NUM_PIVOTS=NUM_PIVOTS,
                num_warps=NUM_WARPS["narrow"],
            )  # fmt: skip
        if draws:
            weigh[per_chunk](
                *self._row, *self._parameters, peaks, *kept, *drawn, num_groups, CHUNK_GROUPS=CHUNK_GROUPS,
                PADDED_CHUNKS=padded_chunks, SHIFT=shift, NARROWS=narrows, num_warps=NUM_WARPS["weigh"],
            )  # fmt: skip
        choose[per_row](
            *self._row, *self._parameters, peaks, best_ids, sums, *kept, *drawn, num_groups, num_chunks, sampled,
            normalizers, PADDED_CHUNKS=padded_chunks, SHIFT=shift, DRAWS=draws, NARROWS=narrows,
            num_warps=NUM_WARPS["choose"],
        )  # fmt: skip
        return sampled, normalizers

    def _new(self, count: int, dtype: torch.dtype, is_needed: bool = True) -> Tensor:
        """Room for so many numbers per row."""
        return torch.empty(self._num_rows if is_needed else 1, count, dtype=dtype, device=self._device)
