"""The handoff of hidden states from a stage to the next."""

import logging
import math
import time
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Protocol

import msgspec
import torch
import zmq
from msgspec import Meta, Struct
from torch import Tensor

from gptj_serve.errors import PipelineError, WireError
from gptj_serve.pipeline.sockets import receive
from gptj_serve.wire import WireDecoder

logger = logging.getLogger(__name__)


class Received(NamedTuple):
    hidden: Tensor  # [T, D], on the CPU or on this stage's device; as it is until the next `receive`
    sent_at: float  # Unix time of the sender's host


class HandoffEnd(Protocol):
    """One end of the way that hidden states take between two neighbouring stages; used by one thread.

    Raises `PipelineError` when the neighbour is lost.
    """

    def connect(self, should_stop: Callable[[], bool]) -> None:
        """Meet the neighbour. Returns early when told to stop."""

    def abort(self) -> None:
        """From any thread: whoever waits for the neighbour, on a GPU too, waits no longer; no more can be done here."""

    def close(self) -> None:
        """Once no thread uses it any more."""


class HiddenSender(HandoffEnd, Protocol):
    def send(self, microbatch_id: int, hidden: Tensor) -> None:
        """A GPU's may be overwritten afterwards, by what its current stream does next; a CPU's may still be read."""


class HiddenReceiver(HandoffEnd, Protocol):
    def receive(self, microbatch_id: int, should_stop: Callable[[], bool]) -> Received | None:
        """The hidden states of this microbatch; None when told to stop."""


DTypeName = Literal["float32", "bfloat16", "float16"]

DTYPE_NAMES: dict[torch.dtype, DTypeName] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class HiddenHeader(Struct, frozen=True, array_like=True):
    microbatch_id: Annotated[int, Meta(ge=0)]
    dtype: DTypeName
    shape: Annotated[list[Annotated[int, Meta(ge=1, lt=2**31)]], Meta(min_length=2, max_length=2)]
    sent_at: float

    @classmethod
    def of(cls, microbatch_id: int, hidden: Tensor) -> "HiddenHeader":
        """Sent now."""
        return cls(microbatch_id, DTYPE_NAMES[hidden.dtype], list(hidden.shape), time.time())

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


class ZmqHandoff:
    """Both ends. Tensors as two frames: a header, and the bytes as they lie in memory. A GPU's go by way of the CPU."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        """The socket stays its owner's, who watches it."""
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = WireDecoder[HiddenHeader](HiddenHeader)

    def connect(self, should_stop: Callable[[], bool]) -> None:
        """The socket connects by itself."""

    def send(self, microbatch_id: int, hidden: Tensor) -> None:
        header = HiddenHeader.of(microbatch_id, hidden)
        hidden = hidden.cpu().contiguous()
        self._socket.send_multipart([self._encoder.encode(header), hidden.view(torch.uint8).numpy().data], copy=False)

    def receive(self, microbatch_id: int, should_stop: Callable[[], bool]) -> Received | None:
        """Leaves out what is no message. Raises `PipelineError` for a later microbatch's: this one's is lost then."""
        while (frames := receive(self._socket, should_stop)) is not None:
            try:
                header, data = self._decode(frames)
            except WireError as error:
                logger.warning("hidden states are left out: %s", error)
                continue
            if header.microbatch_id == microbatch_id:
                return Received(data, header.sent_at)
            if header.microbatch_id > microbatch_id:
                raise PipelineError(
                    f"hidden states of microbatch {header.microbatch_id} came when {microbatch_id} was due"
                )
        return None

    def abort(self) -> None:
        """Whoever waits for the socket looks often enough whether it should stop."""

    def close(self) -> None:
        """The socket is its owner's."""

    def _decode(self, frames: list[zmq.Frame]) -> tuple[HiddenHeader, Tensor]:
        header = self._decoder.decode(frames[0].buffer)
        if [len(frame.buffer) for frame in frames[1:]] != [header.num_bytes]:
            raise WireError(f"{len(frames)} frames that are not {header.shape} numbers in {header.dtype}")
        return header, torch.frombuffer(bytearray(frames[1].buffer), dtype=header.torch_dtype).view(header.shape)
