"""Pearson's test, for tests of chance: seeds are fixed there, so a test that passes once passes always."""

import torch
from torch import Tensor

MIN_EXPECTED = 5.0
"""Rarer cells are put together: below, the statistic's distribution is not chi-square's."""


def p_value(counts: Tensor, expected: Tensor, num_constraints: int = 1) -> float:
    """How likely counts at least this far from `expected` are; 0 if what is impossible was counted."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    if counts[expected == 0].any():
        return 0.0
    is_rare = expected < MIN_EXPECTED
    cells = [(counts[~is_rare], expected[~is_rare]), (counts[is_rare].sum()[None], expected[is_rare].sum()[None])]
    counts, expected = (torch.cat(parts) for parts in zip(*cells[: 1 + bool(expected[is_rare].sum() > 0)], strict=True))
    if len(counts) <= num_constraints:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    half_freedom = torch.tensor((len(counts) - num_constraints) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half_freedom, statistic / 2).item()
