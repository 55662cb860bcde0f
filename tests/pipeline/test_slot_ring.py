"""The ring apart from any memory: no slot is written before it was given back, and nothing wrong is believed."""

import os
import random
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import pytest
import torch
from torch import Tensor

from gptj_serve.errors import PipelineError, WireError
from gptj_serve.pipeline.handoff import HiddenHeader
from gptj_serve.pipeline.host_slots import HostReceiverSlots, HostSenderSlots
from gptj_serve.pipeline.slot_ring import (
    MIN_SLOT_BYTES,
    NUM_SLOTS,
    CudaMemory,
    EventHandles,
    Filled,
    Offer,
    RingReceiver,
    RingSender,
)
from gptj_serve.wire import WireDecoder
from tests.pipeline.neighbours import never

HEADER = HiddenHeader(0, "float32", [2, 3], 0.0)


class Recorded:
    """Slots of both ends, which only note what is done with them, in the order of both threads."""

    cuda = None
    file_descriptors: Sequence[int] = ()

    def __init__(self, uses: dict[int, list[str]]) -> None:
        self._uses = uses

    def write(self, slot: int, hidden: Tensor) -> None:
        self._uses[slot].append("write")

    def read(self, slot: int, header: HiddenHeader) -> Tensor:
        self._uses[slot].append("read")
        return torch.zeros(header.shape)

    def release(self, slot: int) -> None:
        self._uses[slot].append("release")

    def close(self) -> None: ...


@pytest.mark.parametrize("seed", range(5))
def test_slots_are_written_read_and_given_back_in_turn(seed: int) -> None:
    """Each end at a pace of its own; now and then the slots become too small, and new ones take their place."""
    rng = random.Random(seed)
    rings: list[dict[int, list[str]]] = []

    def make(num_slots: int, slot_bytes: int) -> Recorded:
        rings.append(defaultdict(list))
        return Recorded(rings[-1])

    num_opened = 0

    def open_slots(offer: Offer, descriptors: Sequence[int]) -> Recorded:
        nonlocal num_opened
        num_opened += 1
        return Recorded(rings[num_opened - 1])

    receiver = RingReceiver(open_slots)
    sender = RingSender(receiver.name, make)
    sender.connect(never)
    receiver.connect(never)
    widths = sorted(rng.choice([1, MIN_SLOT_BYTES // 2, MIN_SLOT_BYTES, 2 * MIN_SLOT_BYTES]) for _ in range(300))
    pauses = [rng.random() < 0.05 for _ in widths]

    def send() -> None:
        for microbatch_id, width in enumerate(widths):
            sender.send(microbatch_id, torch.empty(1, 1).expand(1, width))

    thread = threading.Thread(target=send)
    thread.start()
    for microbatch_id, width in enumerate(widths):
        if pauses[microbatch_id]:
            threading.Event().wait(0.001)
        received = receiver.receive(microbatch_id, never)
        assert received is not None
        assert received.hidden.shape == (1, width)
    thread.join()
    sender.close()
    receiver.close()
    assert len(rings) > 1
    for ring in rings:
        assert 0 < len(ring) <= NUM_SLOTS
        for uses in ring.values():
            expected = ["write", "read", "release"] * (len(uses) // 3 + 1)
            assert uses == expected[: len(uses)]
    assert sum(uses.count("read") for ring in rings for uses in ring.values()) == len(widths)


def test_a_sender_waits_for_a_slot_and_is_told_when_none_will_come() -> None:
    receiver = RingReceiver(HostReceiverSlots)
    sender = RingSender(receiver.name, HostSenderSlots)
    sender.connect(never)
    receiver.connect(never)
    for microbatch_id in range(NUM_SLOTS):
        sender.send(microbatch_id, torch.zeros(2, 3))
    threading.Timer(0.1, receiver.close).start()
    with pytest.raises(PipelineError, match="the next stage takes no hidden states any more"):
        sender.send(NUM_SLOTS, torch.zeros(2, 3))
    sender.close()


def test_nobody_listens() -> None:
    sender = RingSender("gptj_serve-nobody", HostSenderSlots)
    with pytest.raises(PipelineError, match="the next stage does not listen for hidden states"):
        sender.connect(never)
    sender.close()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"\xc1", "no "),
        (msgspec.msgpack.encode(Filled(0, HEADER)), "a slot is filled before there are any"),
        (msgspec.msgpack.encode(Offer(0, 4, 1 << 20)), "0 files is no memory of this host"),
        (msgspec.msgpack.encode(["Offer", 0, 17, 4, None]), "Expected `int` <= 16"),
        (msgspec.msgpack.encode(["Filled", 0, [0, "float64", [2, 3], 0.0]]), "float64"),
    ],
)
def test_what_is_no_message_is_an_error(message: bytes, reason: str) -> None:
    receiver = RingReceiver(HostReceiverSlots)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(f"\0{receiver.name}")
        receiver.connect(never)
        other.send(message)
        with pytest.raises(PipelineError, match=reason):
            receiver.receive(0, never)
    receiver.close()


@pytest.mark.parametrize("filled", [Filled(4, HEADER), Filled(0, HiddenHeader(0, "float32", [2, 600_000], 0.0))])
def test_what_is_outside_of_the_memory_is_an_error(filled: Filled) -> None:
    slots = HostSenderSlots(4, 1 << 20)
    receiver = RingReceiver(HostReceiverSlots)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(f"\0{receiver.name}")
        receiver.connect(never)
        socket.send_fds(other, [msgspec.msgpack.encode(Offer(0, 4, 1 << 20))], list(slots.file_descriptors))
        other.send(msgspec.msgpack.encode(filled))
        with pytest.raises(PipelineError, match="does not fit into"):
            receiver.receive(0, never)
    receiver.close()
    slots.close()


def test_memory_of_another_size_than_is_offered_is_refused() -> None:
    slots = HostSenderSlots(4, 1 << 20)
    (descriptor,) = slots.file_descriptors
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(descriptor, 4096)  # nobody can make it smaller while others have it mapped
    with pytest.raises(WireError, match="is no memory of this host"):
        HostReceiverSlots(Offer(0, 4, 1 << 21), [os.dup(descriptor)])
    slots.close()


def test_an_offer_of_device_memory_survives_the_wire() -> None:
    events = [EventHandles(bytes([n]) * 64, bytes([n + 1]) * 64) for n in range(NUM_SLOTS)]
    memory = CudaMemory(b"\x01" + b"h" * 64, 4 << 20, 2 << 20, b"/torch_1_2_3", 7, b"e" * 64, True, events)
    offer = Offer(3, NUM_SLOTS, 1 << 20, memory)
    assert WireDecoder[Offer | Filled](Offer | Filled).decode(msgspec.msgpack.encode(offer)) == offer


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_not_let_in() -> None:
    """Who knows the name nevertheless."""
    receiver = RingReceiver(HostReceiverSlots)
    code = (
        "import os, socket, sys; os.setuid(65534);"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect('\\0' + sys.argv[1]); s.recv(1)"
    )
    stranger = subprocess.Popen([sys.executable, "-S", "-c", code, receiver.name])
    sender = RingSender(receiver.name, HostSenderSlots)
    try:
        timer = threading.Timer(1.0, sender.connect, [never])
        timer.start()
        receiver.connect(never)
        timer.join()
        assert stranger.wait(10) == 0  # its link was closed
        sender.send(0, torch.ones(2, 3))
        received = receiver.receive(0, never)
        assert received is not None
        assert torch.equal(received.hidden, torch.ones(2, 3))
    finally:
        stranger.kill()
        stranger.wait()
        sender.close()
        receiver.close()
