"""What C code is given pointers to: aligned, all zero, and there for as long as the tensor is."""

import gc
import math

import pytest
import torch

from gptj_serve.kernels.huge_pages import HUGE_PAGE_BYTES, zeros

SHAPES = [(1,), (HUGE_PAGE_BYTES // 4 - 1,), (HUGE_PAGE_BYTES // 4,), (5, HUGE_PAGE_BYTES // 8 + 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_they_are_aligned_and_zero_and_stay(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [zeros(shape, dtype) for _ in range(3)]
    gc.collect()
    for tensor in tensors:
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        assert not tensor.any()
        if tensor.nbytes >= HUGE_PAGE_BYTES:
            assert tensor.data_ptr() % HUGE_PAGE_BYTES == 0
    for value, tensor in enumerate(tensors, 1):
        tensor.fill_(value)
    assert [int(tensor.double().sum()) for tensor in tensors] == [math.prod(shape) * value for value in (1, 2, 3)]
