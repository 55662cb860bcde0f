"""`Device`: what a stage needs of a GPU. `CUDADevice` has it from torch; tests have one that is late on purpose.

Work for a device is put into a `Stream`, which does it in its order, some time later. What the host wants to read of
it, it must wait for, with an `Event`; nothing else here waits.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Event(Protocol):
    """A point in a stream's work."""

    def wait(self) -> None:
        """Block this thread until the device has come so far."""


class Graph(Protocol):
    """Work that was captured: kernels with the addresses and numbers that they had then."""

    def replay(self) -> None:
        """Put it into the stream that it was captured in."""


class Stream(Protocol):
    def launch(self, work: Callable[[], object]) -> None:
        """Put in the kernels that `work` calls. `work` reads nothing from the device."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Of one shape and dtype, both contiguous; each on the device or pinned."""

    def record(self) -> Event:
        """The end of what is in the stream now."""

    def follow(self, event: Event) -> None:
        """What is put in from now on begins after an event of another stream; the host doesn't wait."""

    def capture(self, work: Callable[[], object]) -> Graph:
        """`work` as a graph, after it has run once. It must leave no tensor behind but in memory that it found.

        Graphs of a stream share their memory, since only one runs at a time: capture the largest first.
        """

    def run(self, work: Callable[[], Result]) -> Result:
        """Do `work` in the stream's order; it may read from the device, and so wait for all that is in the stream."""


class Device(Protocol):
    @property
    def torch_device(self) -> torch.device: ...

    def stream(self) -> Stream:
        """A new one."""

    def here(self) -> Stream:
        """The one that torch's own calls in this thread go to."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros in memory of the host that the device copies from and to by itself."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """On the device."""

    def reserved_bytes(self) -> int:
        """Of the device's memory, held by this process for tensors and graphs."""
