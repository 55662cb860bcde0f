"""`RingSender`, `RingReceiver`: hidden states through memory that two processes of one host share.

The sender offers a few slots of memory. It writes into a free one and tells its number; the receiver reads in place,
and with its next `receive` gives the slot back. Where the slots are (`SenderSlots`, `ReceiverSlots`) is all that
differs between the memory of a host and that of a GPU.

Beside the memory there is one Unix socket, of the kind that keeps messages apart. Its name is random and known to the
two stages alone, in no file system; both ends must belong to the same user. It ends with either process, so nobody
waits for a neighbour that is gone.
"""

import contextlib
import os
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta, Struct
from torch import Tensor

from gptj_serve.errors import PipelineError, WireError
from gptj_serve.pipeline.handoff import HiddenHeader, Received
from gptj_serve.pipeline.sockets import POLL_INTERVAL_MS
from gptj_serve.steps import MAX_FRAME_BYTES
from gptj_serve.wire import WireDecoder

NUM_SLOTS = 4
"""A sender that is further ahead waits; two would do for it never to wait for a receiver that is on time."""

MIN_SLOT_BYTES = 1 << 20

_MAX_MESSAGE_BYTES = 8192


class EventHandles(Struct, frozen=True, array_like=True):
    """Of one slot: when it has been written, and when it has been read."""

    written: Annotated[bytes, Meta(min_length=64, max_length=64)]
    read: Annotated[bytes, Meta(min_length=64, max_length=64)]


class CudaMemory(Struct, frozen=True, array_like=True):
    """What torch needs to open another process's device memory, but for the device, and events for every slot."""

    handle: Annotated[bytes, Meta(max_length=1024)]
    num_bytes: Annotated[int, Meta(ge=0, lt=2**40)]
    offset: Annotated[int, Meta(ge=0, lt=2**48)]
    counter_handle: Annotated[bytes, Meta(max_length=256)]
    counter_offset: Annotated[int, Meta(ge=0, lt=2**48)]
    event_handle: Annotated[bytes, Meta(max_length=64)]
    event_sync_required: bool
    events: Annotated[list[EventHandles], Meta(max_length=16)]


class Offer(Struct, frozen=True, array_like=True, tag=True):
    """New slots take the place of those before. A host's memory comes as a file descriptor beside this message."""

    ring: Annotated[int, Meta(ge=0, lt=256)]
    num_slots: Annotated[int, Meta(ge=1, le=16)]
    slot_bytes: Annotated[int, Meta(ge=1, le=MAX_FRAME_BYTES)]
    cuda: CudaMemory | None = None


class Filled(Struct, frozen=True, array_like=True, tag=True):
    slot: Annotated[int, Meta(ge=0, lt=16)]
    header: HiddenHeader


class SenderSlots(Protocol):
    """Slots that this process has made."""

    cuda: CudaMemory | None
    file_descriptors: Sequence[int]

    def write(self, slot: int, hidden: Tensor) -> None:
        """Once the slot has been read, on a GPU in stream order; so is the copy."""

    def close(self) -> None: ...


class ReceiverSlots(Protocol):
    """Slots that the neighbour has made."""

    def read(self, slot: int, header: HiddenHeader) -> Tensor:
        """A view of the slot; on a GPU the current stream waits until it has been written."""

    def release(self, slot: int) -> None:
        """What reads the view has been done, or is queued on the current stream."""


class RingSender:
    """Connects to the name that the receiver listens at."""

    def __init__(self, name: str, make_slots: Callable[[int, int], SenderSlots]) -> None:
        """`make_slots(num_slots, slot_bytes)`"""
        self._name = name
        self._make_slots = make_slots
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._encoder = msgspec.msgpack.Encoder()
        self._slots: SenderSlots | None = None
        self._slot_bytes = 0
        self._ring = -1
        self._free: list[int] = []

    def connect(self, should_stop: Callable[[], bool]) -> None:
        try:
            self._socket.connect(f"\0{self._name}")
        except OSError as error:
            raise PipelineError(f"the next stage does not listen for hidden states: {error}") from error
        _require_own_user(self._socket)

    def send(self, microbatch_id: int, hidden: Tensor) -> None:
        header = HiddenHeader.of(microbatch_id, hidden)
        try:
            if header.num_bytes > self._slot_bytes:
                self._offer(header.num_bytes)
            assert self._slots is not None
            while not self._free:
                self._take_back()
            slot = self._free.pop()
            self._slots.write(slot, hidden)
            self._socket.send(self._encoder.encode(Filled(slot, header)))
            if not self._free:  # the next step need not ask
                with contextlib.suppress(BlockingIOError):
                    self._take_back(socket.MSG_DONTWAIT)
        except OSError as error:
            raise PipelineError(f"the next stage takes no hidden states any more: {error}") from error

    def abort(self) -> None:
        _shut_down(self._socket)

    def close(self) -> None:
        self._socket.close()
        if self._slots is not None:
            self._slots.close()
            self._slots = None  # and with it the memory

    def _offer(self, num_bytes: int) -> None:
        """Slots of at least so many bytes. Those before are the receiver's until it has read what is in them."""
        if self._slots is not None:
            self._slots.close()
        self._slot_bytes = max(MIN_SLOT_BYTES, 1 << (num_bytes - 1).bit_length())
        self._slots = self._make_slots(NUM_SLOTS, self._slot_bytes)
        self._ring = (self._ring + 1) % 256
        self._free = list(range(NUM_SLOTS))
        offer = Offer(self._ring, NUM_SLOTS, self._slot_bytes, self._slots.cuda)
        socket.send_fds(self._socket, [self._encoder.encode(offer)], list(self._slots.file_descriptors))

    def _take_back(self, flags: int = 0) -> None:
        message = self._socket.recv(2, flags)
        if not message:
            raise PipelineError("the next stage takes no hidden states any more")
        ring, slot = message
        if ring == self._ring:
            self._free.append(slot)


class RingReceiver:
    """Listens from the start, at `name`."""

    def __init__(self, open_slots: Callable[[Offer, Sequence[int]], ReceiverSlots]) -> None:
        """`open_slots(offer, file_descriptors)` owns the descriptors. Raises `WireError` for what it can't open."""
        self.name = f"gptj_serve-{secrets.token_hex(16)}"
        self._open_slots = open_slots
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.name}")
        self._listener.listen()
        self._listener.settimeout(POLL_INTERVAL_MS / 1000)
        self._socket: socket.socket | None = None
        self._decoder = WireDecoder[Offer | Filled](Offer | Filled)
        self._offer: Offer | None = None
        self._slots: ReceiverSlots | None = None
        self._held: int | None = None  # the slot that the last `receive` returned

    def connect(self, should_stop: Callable[[], bool]) -> None:
        while self._socket is None and not should_stop():
            try:
                accepted, _ = self._listener.accept()
            except TimeoutError:
                continue
            try:
                _require_own_user(accepted)
            except PipelineError:
                accepted.close()
                continue
            accepted.settimeout(POLL_INTERVAL_MS / 1000)
            self._socket = accepted

    def receive(self, microbatch_id: int, should_stop: Callable[[], bool]) -> Received | None:
        assert self._socket is not None
        try:
            self._release()
            while not should_stop():
                try:
                    data, descriptors, _, _ = socket.recv_fds(self._socket, _MAX_MESSAGE_BYTES, 1)
                except TimeoutError:
                    continue
                if not data:
                    if should_stop():
                        break
                    raise PipelineError("the stage before sends no hidden states any more")
                message = self._decoder.decode(data)
                if isinstance(message, Filled):
                    return self._read(message, microbatch_id)
                self._slots, self._offer = self._open_slots(message, descriptors), message
        except (OSError, WireError) as error:
            raise PipelineError(f"no hidden states come from the stage before: {error}") from error
        return None

    def abort(self) -> None:
        if self._socket is not None:
            _shut_down(self._socket)

    def close(self) -> None:
        self._listener.close()
        if self._socket is not None:
            self._socket.close()
        self._slots = None

    def _read(self, filled: Filled, microbatch_id: int) -> Received:
        header = filled.header
        if header.microbatch_id != microbatch_id:
            raise PipelineError(f"hidden states of microbatch {header.microbatch_id} came when {microbatch_id} was due")
        if self._offer is None or self._slots is None:
            raise WireError("a slot is filled before there are any")
        if filled.slot >= self._offer.num_slots or header.num_bytes > self._offer.slot_bytes:
            raise WireError(f"{filled} does not fit into {self._offer}")
        hidden = self._slots.read(filled.slot, header)
        self._held = filled.slot
        return Received(hidden, header.sent_at)

    def _release(self) -> None:
        """Give back the slot that is held."""
        if self._held is not None:
            assert self._socket is not None
            assert self._offer is not None
            assert self._slots is not None
            self._slots.release(self._held)
            self._socket.send(bytes([self._offer.ring, self._held]))
            self._held = None


def _require_own_user(connection: socket.socket) -> None:
    """Raises `PipelineError` if the other end is another user's."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.geteuid():
        raise PipelineError(f"user {user} is at the other end of a link for hidden states")


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may have ended already
        connection.shutdown(socket.SHUT_RDWR)
