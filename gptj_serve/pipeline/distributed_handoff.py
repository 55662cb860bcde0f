"""`DistributedSender`, `DistributedReceiver`: hidden states over torch.distributed.

NCCL carries them between GPUs, gloo between CPUs.

Each pair of neighbours has a process group of its own, on a store of its own which the receiver hosts: so both can be
made anew beside a stage that was replaced, while the other pairs go on, and nothing of a former group can be mistaken
for this one's. torch's default group could not: it is one for all stages, and to be had once per process. So the
backend is made directly.

The header goes over the pair's ZeroMQ link: what comes is known before the receiver waits for it, so a neighbour that
has nothing to send, or hangs, holds nothing that can't be told to stop, and no kernel of NCCL waits on the GPU all the
while. Between GPUs it is sent when the device has been given its work, long before that is done.
"""

import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed
import zmq
from torch import Tensor

from gptj_serve.environment import keep_nccl_from_ending_the_process
from gptj_serve.errors import PipelineError, WireError
from gptj_serve.pipeline.handoff import HiddenHeader, Received
from gptj_serve.pipeline.sockets import LINK_TIMEOUT_S, receive
from gptj_serve.wire import WireDecoder

_dist: Any = torch.distributed  # its types leave out what is made in C++

CONNECT_TIMEOUT_S = 30.0
"""In it both ends must have come, and NCCL have found its way between their GPUs."""

MIN_BUFFER_BYTES = 1 << 20

_GPU_BUFFERS = 2
_CPU_BUFFERS = 64
"""Of a sender. gloo's sends can't be waited for without risking that a slow neighbour counts as lost, so there are more
of them than steps are ever in flight. On a GPU the stream waits, and two are enough."""

_NEVER = timedelta(days=30)


class _Work(Protocol):
    def wait(self, timeout: timedelta = ...) -> bool: ...


class _Group(Protocol):
    """`ProcessGroupNCCL` or `ProcessGroupGloo`."""

    def send(self, tensors: Sequence[Tensor], rank: int, tag: int) -> _Work: ...

    def recv(self, tensors: Sequence[Tensor], rank: int, tag: int) -> _Work: ...

    def abort(self) -> None: ...


class _Buffers:
    """Preallocated and used in turn; each grows to the most that it has held."""

    def __init__(self, num_buffers: int, device: torch.device) -> None:
        self._device = device
        self._memory = [torch.empty(0, dtype=torch.uint8)] * num_buffers
        self._next = 0

    def take(self) -> int:
        index, self._next = self._next, (self._next + 1) % len(self._memory)
        return index

    def grow(self, index: int, num_bytes: int) -> bool:
        """False if the buffer was large enough."""
        if self._memory[index].nbytes >= num_bytes:
            return False
        size = max(MIN_BUFFER_BYTES, 1 << (num_bytes - 1).bit_length())
        self._memory[index] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return True

    def view(self, index: int, header: HiddenHeader) -> Tensor:
        return self._memory[index][: header.num_bytes].view(header.torch_dtype).view(header.shape)


class _End:
    """What both ends have in common: they meet in a store, form the group and try it."""

    rank: int

    def __init__(self, host: str, device: torch.device, connect_timeout_s: float) -> None:
        """`host`: the address of this host that the neighbour can reach."""
        self._host = host
        self._connect_timeout_s = connect_timeout_s
        self._device = device
        self._group: _Group | None = None

    def abort(self) -> None:
        """NCCL's kernels end, and with them what waits for the device. gloo has no such thing, nor a need for it."""
        if self._group is not None and self._device.type == "cuda":
            self._group.abort()

    def close(self) -> None:
        self.abort()
        self._group = None

    def _form_group(self, store: Any) -> None:
        """Raises `PipelineError` if that fails or takes too long."""
        try:
            self._group = group = _new_group(store, self.rank, self._device, self._host, self._connect_timeout_s)
            token = torch.zeros(1, device=self._device)
            work = group.send([token], 1, 0) if self.rank == 0 else group.recv([token], 0, 0)
            self._wait(work, self._connect_timeout_s)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        except (RuntimeError, ValueError) as error:  # torch.distributed's own are RuntimeErrors
            raise PipelineError(f"no process group between two neighbours: {_first_line(error)}") from error

    def _wait(self, work: _Work, timeout_s: float) -> None:
        """On a GPU the current stream waits, and not the host."""
        if self._device.type == "cuda":
            work.wait()
        else:
            work.wait(timedelta(seconds=timeout_s))


class DistributedSender(_End):
    """Rank 0 of the pair. `address` is where the receiver's store listens."""

    rank = 0

    def __init__(
        self,
        link: zmq.Socket[bytes],
        address: str,
        host: str,
        device: torch.device,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        super().__init__(host, device, connect_timeout_s)
        self._link = link
        self._address = address
        self._encoder = msgspec.msgpack.Encoder()
        self._buffers = _Buffers(_GPU_BUFFERS if device.type == "cuda" else _CPU_BUFFERS, device)
        self._sent: dict[int, _Work] = {}

    def connect(self, should_stop: Callable[[], bool]) -> None:
        host, _, port = self._address.rpartition(":")
        timeout = timedelta(seconds=self._connect_timeout_s)
        try:
            store = _dist.TCPStore(host, int(port), 2, is_master=False, timeout=timeout, wait_for_workers=False)
        except RuntimeError as error:
            raise PipelineError(f"the next stage's store can't be reached: {_first_line(error)}") from error
        self._form_group(store)

    def send(self, microbatch_id: int, hidden: Tensor) -> None:
        assert self._group is not None
        header = HiddenHeader.of(microbatch_id, hidden)
        index = self._buffers.take()
        try:
            if index in self._sent:
                self._wait(self._sent.pop(index), LINK_TIMEOUT_S)
            self._buffers.grow(index, header.num_bytes)
            buffer = self._buffers.view(index, header)
            buffer.copy_(hidden)
            self._sent[index] = self._group.send([buffer], 1, 0)
        except RuntimeError as error:
            raise PipelineError(f"hidden states can't be sent: {_first_line(error)}") from error
        self._link.send(self._encoder.encode(header))


class DistributedReceiver(_End):
    """Rank 1 of the pair. Its store listens at `address`, on the interface with this host's own IP alone."""

    rank = 1

    def __init__(
        self, link: zmq.Socket[bytes], host: str, device: torch.device, connect_timeout_s: float = CONNECT_TIMEOUT_S
    ) -> None:
        super().__init__(host, device, connect_timeout_s)
        self._link = link
        self._decoder = WireDecoder[HiddenHeader](HiddenHeader)
        self._buffers = _Buffers(2, device)
        listener = socket.create_server((host, 0))
        self.address = f"{host}:{listener.getsockname()[1]}"
        self._store: Any = _dist.TCPStore(
            host,
            listener.getsockname()[1],
            2,
            is_master=True,
            timeout=timedelta(seconds=connect_timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # the store's from now on
        )
        self._stream: torch.cuda.Stream | None = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._read: list[torch.cuda.Event | None] = [None, None]  # of each buffer, when it has last been read
        self._held: int | None = None

    def connect(self, should_stop: Callable[[], bool]) -> None:
        assert self._store is not None
        self._form_group(self._store)

    def receive(self, microbatch_id: int, should_stop: Callable[[], bool]) -> Received | None:
        assert self._group is not None
        if self._held is not None:
            self._record_read(self._held)
        frames = receive(self._link, should_stop)
        if frames is None:
            return None
        try:
            header = self._decoder.decode(frames[0].buffer)
        except WireError as error:
            raise PipelineError(f"hidden states came without a header: {error}") from error
        if header.microbatch_id != microbatch_id:
            raise PipelineError(f"hidden states of microbatch {header.microbatch_id} came when {microbatch_id} was due")
        self._held = index = self._buffers.take()
        if self._buffers.grow(index, header.num_bytes):
            self._record_read(index)  # of whatever had the memory before
        buffer = self._buffers.view(index, header)
        try:
            self._wait(self._start(buffer, self._read[index]), LINK_TIMEOUT_S)
        except RuntimeError as error:
            raise PipelineError(f"hidden states can't be received: {_first_line(error)}") from error
        return Received(buffer, header.sent_at)

    def close(self) -> None:
        super().close()
        self._store = None

    def _start(self, buffer: Tensor, read: "torch.cuda.Event | None") -> _Work:
        """On a GPU beside what the current stream does: it only waits until what was in the buffer has been read."""
        assert self._group is not None
        if self._stream is None:
            return self._group.recv([buffer], 0, 0)
        if read is not None:
            self._stream.wait_event(read)
        with torch.cuda.stream(self._stream):
            return self._group.recv([buffer], 0, 0)

    def _record_read(self, index: int) -> None:
        if self._stream is not None:
            self._read[index] = torch.cuda.current_stream(self._device).record_event()


def _new_group(store: Any, rank: int, device: torch.device, host: str, connect_timeout_s: float) -> _Group:
    own_store = _dist.PrefixStore("hidden", store)
    if device.type == "cuda":
        keep_nccl_from_ending_the_process()
        options = _dist.ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        nccl: _Group = _dist.ProcessGroupNCCL(own_store, rank, 2, options)
        return nccl
    options = _dist.ProcessGroupGloo._Options()
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=host)]
    options._threads = 1
    options._timeout = timedelta(seconds=connect_timeout_s)
    gloo: _Group = _dist.ProcessGroupGloo(own_store, rank, 2, options)
    return gloo


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
