"""What a draw on the device needs to know of each row, as one table that a step copies at once.

Shapes: `R` rows, padded up to a bucket, `F` fields of 64 bits.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch

from gptj_serve.engine.warpers import MAX_TEMPERATURE, MIN_TEMPERATURE
from gptj_serve.steps import SampleSpec


class Field(IntEnum):
    """The lines of the table [F, R] of int64; the last three hold the bits of fp64 numbers."""

    SEED = 0
    POSITION = 1
    TOP_K = 2  # 0 if there is none
    TEMPERATURE = 3  # 0 for the best token alone
    TOP_P = 4  # 1 if there is none
    LOG_MIN_P = 5  # -inf if there is none


class SamplingMode(IntEnum):
    """What rows ask for together. A mode also serves rows that ask for less, with the same results in every bit."""

    GREEDY = 0
    DRAWN = 1
    NARROWED = 2  # by top-k, top-p or min-p


def can_sample_on_device(spec: SampleSpec) -> bool:
    """Whether the kernels alone choose the token, with nothing from the host but a row of the table."""
    return has_kernels(spec) and spec.edits is None and not spec.num_top_logprobs


def has_kernels(spec: SampleSpec) -> bool:
    """Whether the kernels choose the token, greedily or drawn with temperature, top-k, top-p and min-p.

    Other choices are the engine's: with guidance, of candidates for beams, and with the rarer warpers, typical-p and
    the epsilon and eta cutoffs.
    """
    if spec.guidance_scale != 1 or spec.num_candidates:
        return False
    warpers = spec.warpers
    return is_greedy(spec) or (warpers.typical_p == 1 and not warpers.epsilon_cutoff and not warpers.eta_cutoff)


def is_greedy(spec: SampleSpec) -> bool:
    """The best token alone is the first of the best, also among equals."""
    return spec.warpers.temperature == 0 or spec.warpers.top_k == 1


def parameter_table(num_rows: int, device: torch.device | None = None, is_pinned: bool = False) -> torch.Tensor:
    """[F, R] for so many rows, all of them padding: greedy ones, whose results nobody reads."""
    return torch.zeros(len(Field), num_rows, dtype=torch.int64, device=device, pin_memory=is_pinned)


def write_parameters(table: torch.Tensor, specs: Sequence[SampleSpec], positions: Sequence[int]) -> SamplingMode:
    """Describe rows of `can_sample_on_device` specs in a `parameter_table` on the host; the rest of it is padding.

    `positions` are those that the new tokens take. Returns the least mode that serves them.
    """
    numbers: np.ndarray = table.numpy()
    assert len(specs) <= numbers.shape[1]
    numbers[:] = 0
    drawn = [row for row, spec in enumerate(specs) if not is_greedy(spec)]
    if not drawn:
        return SamplingMode.GREEDY
    reals = numbers.view(np.float64)
    warpers = [specs[row].warpers for row in drawn]
    numbers[Field.SEED, drawn] = [specs[row].seed for row in drawn]
    numbers[Field.POSITION, drawn] = [positions[row] for row in drawn]
    numbers[Field.TOP_K, drawn] = [w.top_k for w in warpers]
    reals[Field.TEMPERATURE, drawn] = [min(max(w.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE) for w in warpers]
    reals[Field.TOP_P, drawn] = [w.top_p for w in warpers]
    with np.errstate(divide="ignore"):  # the logarithm of 0
        reals[Field.LOG_MIN_P, drawn] = np.log([w.min_p for w in warpers])
    is_narrowed = any(w.top_k or w.top_p < 1 or w.min_p for w in warpers)
    return SamplingMode.NARROWED if is_narrowed else SamplingMode.DRAWN
