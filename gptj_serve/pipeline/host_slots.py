"""Slots of a ring in memory that two processes of one host share. It has no name, so none is left when they are killed.

Linux only. A step's time counts here in microseconds, most of them those of Python code and data that the stage's
computation has driven out of the caches: so what can be made once isn't made for each step.
"""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from gptj_serve.errors import WireError
from gptj_serve.pipeline.handoff import HiddenHeader
from gptj_serve.pipeline.slot_ring import CudaMemory, Offer
from gptj_serve.pipeline.slot_views import SlotViews


class HostSenderSlots:
    """Takes the memory of what is written only: pages that no hidden states have reached don't exist."""

    cuda: CudaMemory | None = None

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        descriptor = os.memfd_create("gptj_serve-hidden", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.file_descriptors: Sequence[int] = [descriptor]
        self._slot_bytes = slot_bytes
        os.ftruncate(descriptor, num_slots * slot_bytes)
        # who has it mapped shall not be ended by a signal because it has become shorter
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        memory = torch.frombuffer(mmap.mmap(descriptor, num_slots * slot_bytes), dtype=torch.uint8)
        self._address = memory.data_ptr()
        self._views = SlotViews(memory, slot_bytes)

    def write(self, slot: int, hidden: Tensor) -> None:
        if hidden.device.type == "cpu":
            hidden = hidden.contiguous()
            ctypes.memmove(self._address + slot * self._slot_bytes, hidden.data_ptr(), hidden.nbytes)
        else:
            self._views.of(slot, hidden.dtype, hidden.shape).copy_(hidden)

    def close(self) -> None:
        for descriptor in self.file_descriptors:
            os.close(descriptor)
        self.file_descriptors = []


class HostReceiverSlots:
    def __init__(self, offer: Offer, file_descriptors: Sequence[int]) -> None:
        """Raises `WireError` if they are not what is offered."""
        num_bytes = offer.num_slots * offer.slot_bytes
        try:
            if (
                offer.cuda is not None
                or len(file_descriptors) != 1
                or os.fstat(file_descriptors[0]).st_size != num_bytes
            ):
                raise WireError(f"{offer} with {len(file_descriptors)} files is no memory of this host")
            memory = mmap.mmap(file_descriptors[0], num_bytes)
        finally:
            for descriptor in file_descriptors:
                os.close(descriptor)
        self._views = SlotViews(torch.frombuffer(memory, dtype=torch.uint8), offer.slot_bytes)

    def read(self, slot: int, header: HiddenHeader) -> Tensor:
        return self._views.of(slot, header.torch_dtype, header.shape)

    def release(self, slot: int) -> None:
        """The message that gives it back comes after all reads."""
