"""`zeros`: tensors in huge pages where the kernel has them: a step reads all weights, and each page costs a lookup.

They are asked for (madvise) where Linux grants them on request, as it does by default.
"""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
"""On x86-64."""


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What does not fill a huge page lies in small ones: no memory is wasted."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(*shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory
    first = -raw.data_ptr() % HUGE_PAGE_BYTES
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, first, num_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)
    return raw[first : first + num_bytes].view(dtype).view(*shape)
