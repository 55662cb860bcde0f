"""`SlotViews`: memory cut into slots, looked at as hidden states."""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_VIEWS = 256


class SlotViews:
    """Keeps the last views: decode steps are of one shape mostly, and to make a view takes longer than to copy it."""

    def __init__(self, memory: Tensor, slot_bytes: int) -> None:
        """`memory`: uint8, one after the other."""
        self._memory = memory
        self._slot_bytes = slot_bytes
        self._views: dict[tuple[int, torch.dtype, int, int], Tensor] = {}

    def of(self, slot: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        num_tokens, width = shape
        key = (slot, dtype, num_tokens, width)
        view = self._views.get(key)
        if view is None:
            if len(self._views) == MAX_VIEWS:
                self._views.clear()
            start, num_bytes = slot * self._slot_bytes, num_tokens * width * dtype.itemsize
            view = self._memory[start : start + num_bytes].view(dtype).view(num_tokens, width)
            self._views[key] = view
        return view
