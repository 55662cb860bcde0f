"""`row_statistics`: what every row of logits is asked for, in one pass of our kernels."""

import torch
from torch import Tensor

from gptj_serve.kernels.cpu_library import cpu_library


def row_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 logits [N, V] → rows' logarithms of the sum of exp [N, 1], and their best tokens [N], as
    `engine.sampling.Statistics`. Rows don't depend on each other, in any bit."""
    assert logits.dtype == torch.float32
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_rows, num_tokens = logits.shape
    normalizers, best_ids = torch.empty(num_rows, 1), torch.empty(num_rows, dtype=torch.int64)
    cpu_library().gptj_row_statistics(
        logits.data_ptr(),
        num_rows,
        logits.stride(0),
        num_tokens,
        best_ids.data_ptr(),
        normalizers.data_ptr(),
        torch.get_num_threads(),
    )
    return normalizers, best_ids
