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
    hidden: Tensor  # [T, D], on the CPU or on this stage's device
    sent_at: float  # Unix time of the sender's host


class Handoff(Protocol):
    """Hidden states on their way between two neighbouring stages; each end uses its half."""

    def send(self, microbatch_id: int, hidden: Tensor) -> None: ...

    def receive(self, microbatch_id: int, should_stop: Callable[[], bool]) -> Received | None:
        """The hidden states of this microbatch; None when told to stop."""


class HiddenHeader(Struct, frozen=True, array_like=True):
    microbatch_id: Annotated[int, Meta(ge=0)]
    dtype: Literal["float32", "bfloat16", "float16"]
    shape: Annotated[list[Annotated[int, Meta(ge=1, lt=2**31)]], Meta(min_length=2, max_length=2)]
    sent_at: float


_NAMES: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class ZmqHandoff:
    """Tensors as two frames: a header, and the bytes as they lie in memory. A GPU's go by way of the CPU."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = WireDecoder[HiddenHeader](HiddenHeader)

    def send(self, microbatch_id: int, hidden: Tensor) -> None:
        sent_at = time.time()
        hidden = hidden.cpu().contiguous()
        header = HiddenHeader(microbatch_id, _NAMES[hidden.dtype], list(hidden.shape), sent_at)
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

    def _decode(self, frames: list[zmq.Frame]) -> tuple[HiddenHeader, Tensor]:
        header = self._decoder.decode(frames[0].buffer)
        dtype: torch.dtype = getattr(torch, header.dtype)
        num_bytes = math.prod(header.shape) * dtype.itemsize
        if [len(frame.buffer) for frame in frames[1:]] != [num_bytes]:
            raise WireError(f"{len(frames)} frames that are not {header.shape} numbers in {header.dtype}")
        return header, torch.frombuffer(bytearray(frames[1].buffer), dtype=dtype).view(header.shape)
