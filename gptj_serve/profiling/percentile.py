"""The percentiles of all that is measured here, so that figures of one kind can be compared."""

import math

import numpy as np
from numpy.typing import ArrayLike


def percentile(values: ArrayLike, share: float, of_nothing: float = math.nan) -> float:
    """Linear between the two nearest values, as numpy's default: for a share of 0.99 the p99."""
    array = np.asarray(values, dtype=np.float64)
    return float(np.quantile(array, share)) if array.size else of_nothing
