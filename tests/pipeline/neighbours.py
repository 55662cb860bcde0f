"""Two neighbouring stages' ends of a handoff, the other one in a process of its own that does as it is told."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Self

import pytest
import torch
import zmq
from torch import Tensor

from gptj_serve.config import HandoffKind
from gptj_serve.pipeline.handoff import HiddenReceiver, HiddenSender
from gptj_serve.pipeline.handoff_ends import Site, listen, reach
from gptj_serve.pipeline.sockets import bind_receiver, connect_sender

KINDS = [
    "zmq",
    "shared_memory",
    "distributed",
    pytest.param("cuda_ipc", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
"""All; NCCL would need two GPUs, and does what gloo does here."""

Side = Literal["sender", "receiver"]


def device_of(kind: HandoffKind) -> torch.device:
    return torch.device("cuda" if kind == "cuda_ipc" else "cpu")


def site_of(kind: HandoffKind) -> Site:
    return Site(device_of(kind), "127.0.0.1")


def never() -> bool:
    return False


def hidden_of(seed: int, num_tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextlib.contextmanager
def open_receiver(kind: HandoffKind, link_address: str) -> Iterator[tuple[HiddenReceiver, tuple[str, str]]]:
    """The end, not connected yet, and what its sender needs to know."""
    context = zmq.Context[zmq.Socket[bytes]]()
    link = context.socket(zmq.PULL)
    address = bind_receiver(link, link_address, None)
    end, tensors = listen(kind, link, site_of(kind))
    try:
        yield end, (address, tensors)
    finally:
        end.close()
        context.destroy(linger=0)


@contextlib.contextmanager
def open_sender(kind: HandoffKind, addresses: tuple[str, str]) -> Iterator[HiddenSender]:
    """Not connected yet."""
    context = zmq.Context[zmq.Socket[bytes]]()
    link = context.socket(zmq.PUSH)
    connect_sender(link, addresses[0], None)
    end = reach(kind, link, addresses[1], site_of(kind))
    try:
        yield end
    finally:
        end.close()
        context.destroy(linger=0)


def process_context(kind: HandoffKind) -> Any:
    """Forked processes have torch imported, but can't use CUDA: whoever imported this module has asked for GPUs."""
    if kind == "cuda_ipc":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pipeline.neighbours", "tests.pipeline.scripted_stages"])
    return context


class Neighbour:
    """A process with one end, which does what it is told; `answer` waits for what came of it."""

    def __init__(self, side: Side, kind: HandoffKind, what: str | tuple[str, str]) -> None:
        """`what`: the receiver's link address, or for a sender what its receiver told."""
        context = process_context(kind)
        self._pipe, theirs = context.Pipe()
        run = run_sender if side == "sender" else run_receiver
        self.process = context.Process(target=run, args=(theirs, kind, what), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()

    def tell(self, *command: Any) -> None:
        self._pipe.send(command)

    def answer(self, timeout_s: float = 60.0) -> Any:
        assert self._pipe.poll(timeout_s), "the neighbour says nothing"
        return self._pipe.recv()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def run_sender(pipe: Connection, kind: HandoffKind, addresses: tuple[str, str]) -> None:
    """Commands: (first microbatch, list of (seed, tokens, width, dtype))."""
    torch.set_num_threads(1)
    with open_sender(kind, addresses) as end:
        end.connect(never)
        pipe.send("connected")
        while True:
            first, sizes = pipe.recv()
            for microbatch_id, size in enumerate(sizes, start=first):
                end.send(microbatch_id, hidden_of(*size).to(device_of(kind)))
            pipe.send("sent")


def run_receiver(pipe: Connection, kind: HandoffKind, link_address: str) -> None:
    """Commands: (first microbatch, how many)."""
    torch.set_num_threads(1)
    with open_receiver(kind, link_address) as (end, addresses):
        pipe.send(addresses)
        end.connect(never)
        while True:
            first, count = pipe.recv()
            for microbatch_id in range(first, first + count):
                received = end.receive(microbatch_id, never)
                assert received is not None
                pipe.send(received.hidden.float().cpu().numpy().tobytes())


def link_address(directory: Path) -> str:
    return f"ipc://{directory}/hidden"
