"""`CUDADevice`: a `Device` by torch.cuda."""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptj_serve.pipeline.gpu.device import Event, Graph, Result

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE


class CUDADevice:
    def __init__(self, torch_device: torch.device) -> None:
        index = torch.cuda.current_device() if torch_device.index is None else torch_device.index
        self.torch_device = torch.device("cuda", index)
        self._idle: list[torch.cuda.Stream] = []

    def stream(self) -> "CUDAStream":
        """One of nobody's, if there is one: cuBLAS's workspace for it, which is never freed, is used again."""
        stream = self._idle.pop() if self._idle else torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        made = CUDAStream(self.torch_device, stream)
        weakref.finalize(made, self._idle.append, stream).atexit = False
        return made

    def here(self) -> "CUDAStream":
        return CUDAStream(self.torch_device, torch.cuda.current_stream(self.torch_device))

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        zeros = torch.zeros(shape, dtype=dtype, device=self.torch_device)
        torch.cuda.synchronize(self.torch_device)  # streams made later don't wait for the one that this ran in
        return zeros

    def reserved_bytes(self) -> int:
        return int(torch.cuda.memory_reserved(self.torch_device))


class CUDAStream:
    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device = device
        self._stream = stream
        self._pool: _POOL_HANDLE | None = None  # of the graphs

    def launch(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record(self) -> "CUDAEvent":
        return CUDAEvent(self._stream)

    def follow(self, event: Event) -> None:
        assert isinstance(event, CUDAEvent)
        self._stream.wait_event(event.event)

    def capture(self, work: Callable[[], object]) -> Graph:
        self.launch(work)  # kernels are compiled, handles and workspaces made: none of that may happen in a capture
        self._stream.synchronize()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            # by default calls of other threads would end the capture; other stages may be at work
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            work()
        return CUDAGraph(graph, self._stream)

    def run(self, work: Callable[[], Result]) -> Result:
        with torch.cuda.stream(self._stream):
            result = work()
        self._stream.synchronize()
        return result


class CUDAGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        self._graph = graph
        self._stream = stream

    def replay(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()


class CUDAEvent:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        # Waiting spins, in a call that lets other threads of Python run: being woken up would take longer than the rest
        # of what is between two steps.
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()
