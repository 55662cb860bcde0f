"""`Staging`: pinned memory from which numbers go to the device, in two halves that are filled in turn."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from gptj_serve.pipeline.gpu.device import Device, Event, Stream


class Staging:
    """While the device takes one half, the other is filled: the host waits only if it is two ahead.

    There is one place for them on the device: copies go there in the stream, behind the work on what came before.
    """

    def __init__(self, device: Device, stream: Stream, num_elements: int, dtype: torch.dtype) -> None:
        self._stream = stream
        num_elements = max(1, num_elements)
        self.halves = (device.pinned((num_elements,), dtype), device.pinned((num_elements,), dtype))
        self.arrays: tuple[NDArray[Any], ...] = ()  # the same, for NumPy, which has no bfloat16
        if dtype != torch.bfloat16:
            self.arrays = tuple(half.numpy() for half in self.halves)
        self.on_device = device.zeros((num_elements,), dtype)
        self._copied: list[Event | None] = [None, None]
        self._next = 0

    def begin(self) -> int:
        """Which half may be filled now; waits until its last copy has been made."""
        if (copied := self._copied[self._next]) is not None:
            copied.wait()
        return self._next

    def send(self, num_elements: int) -> Tensor:
        """Copy the beginning of that half; → where it will be on the device."""
        target = self.on_device[:num_elements]
        self._stream.copy(target, self.halves[self._next][:num_elements])
        self._copied[self._next] = self._stream.record()
        self._next = 1 - self._next
        return target
