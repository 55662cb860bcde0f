"""`FakeDevice`: a `Device` on CPU tensors that is as late as it may be, so that a wait that is missing shows.

Nothing that is put into a stream is done before an event after it is waited for. Until then what a copy will bring to
the host is poison there, and what a copy will take from the host is read as it is by then. `NoHostSync` makes an error
of what would make the host wait for a GPU: a stream's work runs under it, and a test can hand work in under it.
"""

import random
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptj_serve.pipeline.gpu.device import Event, Graph, Result

POISON = -0x5EAD5EAD

_NAMES = [
    "item", "tolist", "numpy", "cpu", "cuda", "nonzero", "__bool__", "__int__", "__float__", "__index__", "is_nonzero",
    "equal", "allclose", "masked_select", "unique", "repeat_interleave", "tensor", "as_tensor", "asarray",
]  # fmt: skip
_WAITS = {getattr(owner, name) for owner in (torch, Tensor) for name in _NAMES if hasattr(owner, name)}


class HostSyncError(AssertionError):
    """On a GPU, the host would wait here for the device, or copy to it from memory that isn't pinned."""


class NoHostSync(TorchFunctionMode):
    """In this thread. The device's pinned memory may be looked at; what Triton's interpreter does is the device's."""

    def __init__(self, device: "FakeDevice") -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _waits(func, args) and not self._device.holds_pinned(args[0]) and not _is_called_by_triton():
            raise HostSyncError(f"{getattr(func, '__name__', func)} in a step")
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: Any) -> bool:
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        indices = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, list) or (isinstance(i, Tensor) and i.dtype == torch.bool) for i in indices)
    return func in _WAITS


def _is_called_by_triton() -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("triton."):
            return True
        frame = frame.f_back
    return False


class FakeDevice:
    """With `rng`, streams do some of their work as more is put in, as a device does: no test should need that."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.lock = threading.RLock()
        self.rng = rng
        self.streams: list[FakeStream] = []
        self.num_captured = 0
        self.num_replayed = 0
        self.num_launched = 0  # what was put in without a graph
        self.num_computed = 0  # of what was launched or replayed
        self.error: Exception | None = None  # after one no work is done and every wait fails, as with CUDA
        self._memory: dict[int, tuple[Tensor, bool]] = {}  # by address of the storage; is it pinned?

    def stream(self) -> "FakeStream":
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def here(self) -> "HostStream":
        return HostStream()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._new(shape, dtype, is_pinned=True)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._new(shape, dtype, is_pinned=False)

    def reserved_bytes(self) -> int:
        return sum(tensor.nbytes for tensor, is_pinned in self._memory.values() if not is_pinned)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Refuses memory of the host that the device can't copy from or to by itself."""
        known = self._memory.get(tensor.untyped_storage().data_ptr())
        if known is None:
            raise HostSyncError(f"a copy from or to memory that is neither pinned nor the device's: {tensor.shape}")
        return known[1]

    def holds_pinned(self, value: object) -> bool:
        return isinstance(value, Tensor) and self._memory.get(value.untyped_storage().data_ptr(), (None, False))[1]

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype, *, is_pinned: bool) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype)
        self._memory[tensor.untyped_storage().data_ptr()] = (tensor, is_pinned)
        return tensor


class FakeStream:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self._queue: deque[Callable[[], object]] = deque()
        self._num_put = 0
        self._num_done = 0

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def launch(self, work: Callable[[], object]) -> None:
        self._device.num_launched += 1
        self.put(work, is_computing=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        assert target.is_contiguous()
        assert source.is_contiguous()
        self._device.is_pinned(source)
        if self._device.is_pinned(target):
            target.fill_(POISON if target.dtype == torch.int32 else torch.nan)
        self.put(lambda: target.copy_(source))

    def record(self) -> Event:
        return FakeEvent(self, self._num_put)

    def follow(self, event: Event) -> None:
        self.put(event.wait)

    def capture(self, work: Callable[[], object]) -> Graph:
        self.put(work)
        self.reach(self._num_put)
        self._device.num_captured += 1
        return FakeGraph(self._device, self, work)

    def run(self, work: Callable[[], Result]) -> Result:
        with self._device.lock:
            self.reach(self._num_put)
            return work()

    def put(self, work: Callable[[], object], *, is_computing: bool = False) -> None:
        is_inference = torch.is_inference_mode_enabled()  # the thread that does the work may be another one

        def run() -> None:
            with torch.inference_mode(is_inference), NoHostSync(self._device):
                work()
            self._device.num_computed += is_computing

        with self._device.lock:
            self._queue.append(run)
            self._num_put += 1
            if self._device.rng is not None:
                self.reach(self._device.rng.randint(self._num_done, self._num_put))

    def reach(self, place: int) -> None:
        """Do all work up to there."""
        with self._device.lock:
            if self._device.error is not None:
                raise self._device.error
            while self._num_done < place:
                self._num_done += 1
                try:
                    self._queue.popleft()()
                except Exception as error:
                    self._device.error = error
                    raise


class HostStream:
    """What torch does with CPU tensors is done at once: so it waits for what it follows."""

    def follow(self, event: Event) -> None:
        event.wait()

    def record(self) -> Event:
        return ReachedEvent()


class ReachedEvent:
    def wait(self) -> None:
        """It is over."""


class FakeGraph:
    def __init__(self, device: FakeDevice, stream: FakeStream, work: Callable[[], object]) -> None:
        self._device = device
        self._stream = stream
        self._work = work

    def replay(self) -> None:
        self._device.num_replayed += 1
        self._stream.put(self._work, is_computing=True)


class FakeEvent:
    def __init__(self, stream: FakeStream, place: int) -> None:
        self._stream = stream
        self._place = place

    def wait(self) -> None:
        self._stream.reach(self._place)
