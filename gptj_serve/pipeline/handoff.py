"""The handoff of hidden states from a stage to the next."""

import time
from collections.abc import Callable
from typing import Annotated, NamedTuple, Protocol

import msgspec
import torch
import zmq
from msgspec import Meta, Struct
from torch import Tensor

from gptj_serve.pipeline.sockets import receive


class Received(NamedTuple):
    hidden: Tensor  # [T, D], on the CPU or on this stage's device
    sent_at: float  # Unix time of the sender's host


class Handoff(Protocol):
    """Hidden states on their way between two neighbouring stages; each end uses its half."""

    def send(self, microbatch_id: int, hidden: Tensor) -> None: ...

    def receive(self, microbatch_id: int, should_stop: Callable[[], bool]) -> Received | None:
        """The hidden states of this microbatch; None when told to stop."""


class _HiddenHeader(Struct, frozen=True, array_like=True):
    microbatch_id: Annotated[int, Meta(ge=0)]
    dtype: str
    shape: Annotated[list[Annotated[int, Meta(ge=1, lt=2**31)]], Meta(min_length=2, max_length=2)]
    sent_at: float


class ZmqHandoff:
    """Tensors as two frames: a header, and the bytes as they lie in memory. A GPU's go by way of the CPU."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(_HiddenHeader)

    def send(self, microbatch_id: int, hidden: Tensor) -> None:
        sent_at = time.time()
        hidden = hidden.cpu().contiguous()
        header = _HiddenHeader(microbatch_id, str(hidden.dtype).removeprefix("torch."), list(hidden.shape), sent_at)
        self._socket.send_multipart([self._encoder.encode(header), hidden.view(torch.uint8).numpy().data], copy=False)

    def receive(self, microbatch_id: int, should_stop: Callable[[], bool]) -> Received | None:
        """Raises `msgspec.DecodeError` or `ValueError` for a message that is not this microbatch's."""
        frames = receive(self._socket, should_stop)
        if frames is None:
            return None
        header = self._decoder.decode(frames[0].buffer)
        if header.microbatch_id != microbatch_id or len(frames) != 2:
            raise ValueError(f"hidden states of microbatch {header.microbatch_id} came when {microbatch_id} was due")
        data = torch.frombuffer(bytearray(frames[1].buffer), dtype=getattr(torch, header.dtype))
        return Received(data.view(header.shape), header.sent_at)
