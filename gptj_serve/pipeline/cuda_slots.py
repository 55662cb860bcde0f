"""Slots of a ring in the memory of one GPU that two processes share (CUDA IPC).

Neither host waits for the device: the sender's stream records that a slot has been written before its number is sent,
the receiver's that it has been read before the slot is given back, and the other's stream waits for that. A message is
sent after its event was recorded, so whoever waits for an event waits for the right occurrence of it.

What a process that was killed had recorded may never come: then the neighbour's stream waits for ever, its stage does
not stop when it is told to, and is replaced like one that hangs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptj_serve.errors import WireError
from gptj_serve.pipeline.handoff import HiddenHeader
from gptj_serve.pipeline.slot_ring import CudaMemory, EventHandles, Offer
from gptj_serve.pipeline.slot_views import SlotViews

_cuda: Any = torch.cuda  # much of it has no types

_idle: list[Tensor] = []
"""Memory of rings that this process has closed.

torch keeps memory that was shared until whoever opened it lets go of it, and a process that was killed never does. So
it is not freed but used again, by the next ring of the same size.
"""


class CudaSenderSlots:
    file_descriptors: Sequence[int] = ()

    def __init__(self, num_slots: int, slot_bytes: int, device: torch.device) -> None:
        self._memory = _take_memory(num_slots * slot_bytes, device)
        self._views = SlotViews(self._memory, slot_bytes)
        with torch.cuda.device(device):
            self._written = [_cuda.Event(interprocess=True) for _ in range(num_slots)]
            self._read = [_cuda.Event(interprocess=True) for _ in range(num_slots)]
            events = [
                EventHandles(bytes(written.ipc_handle()), bytes(read.ipc_handle()))
                for written, read in zip(self._written, self._read, strict=True)
            ]
        _, handle, num_bytes, offset, counter_handle, counter_offset, event_handle, event_sync_required = _shared(
            self._memory
        )
        self.cuda: CudaMemory | None = CudaMemory(
            handle, num_bytes, offset, counter_handle, counter_offset, event_handle, event_sync_required, events
        )

    def write(self, slot: int, hidden: Tensor) -> None:
        stream = torch.cuda.current_stream(self._memory.device)
        stream.wait_event(self._read[slot])  # nothing to wait for if it was never recorded
        self._views.of(slot, hidden.dtype, hidden.shape).copy_(hidden)
        self._written[slot].record(stream)

    def close(self) -> None:
        _idle.append(self._memory)


class CudaReceiverSlots:
    def __init__(self, offer: Offer, device: torch.device) -> None:
        """Raises `WireError` if they are not what is offered."""
        cuda = offer.cuda
        if cuda is None or len(cuda.events) != offer.num_slots or cuda.num_bytes != offer.num_slots * offer.slot_bytes:
            raise WireError(f"{offer} is no memory of a GPU")
        _cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        storage = torch.UntypedStorage._new_shared_cuda(
            index, cuda.handle, cuda.num_bytes, cuda.offset, cuda.counter_handle, cuda.counter_offset,
            cuda.event_handle, cuda.event_sync_required,
        )  # fmt: skip
        device = torch.device("cuda", index)
        self._device = device
        self._views = SlotViews(torch.empty(0, dtype=torch.uint8, device=device).set_(storage), offer.slot_bytes)
        self._written = [_cuda.Event.from_ipc_handle(device, event.written) for event in cuda.events]
        self._read = [_cuda.Event.from_ipc_handle(device, event.read) for event in cuda.events]

    def read(self, slot: int, header: HiddenHeader) -> Tensor:
        torch.cuda.current_stream(self._device).wait_event(self._written[slot])
        return self._views.of(slot, header.torch_dtype, header.shape)

    def release(self, slot: int) -> None:
        self._read[slot].record(torch.cuda.current_stream(self._device))


def _shared(memory: Tensor) -> Any:
    """(device, handle, bytes, offset, counter's handle, its offset, event's handle, whether to wait for that event)"""
    storage: Any = memory.untyped_storage()
    return storage._share_cuda_()


def _take_memory(num_bytes: int, device: torch.device) -> Tensor:
    for position, memory in enumerate(_idle):
        if memory.nbytes == num_bytes and device.index in (None, memory.device.index):
            return _idle.pop(position)
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)
