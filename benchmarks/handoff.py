"""What a hop of hidden states costs between two stage processes, by each handoff that they can use.

    python -m benchmarks.handoff

The sender computes for some time, as a stage does (its caches are another's then, and the receiver's core sleeps), and
sends; the receiver notes when it has them. On a GPU the times are the device's: from the end of the computation, for
which the sender's host did not wait, until the hidden states are the receiver's. In turns, so that what else the
machine does hits all alike.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import zmq

from gptj_serve.config import HandoffKind
from gptj_serve.pipeline.handoff_ends import Site, listen, reach
from gptj_serve.pipeline.sockets import bind_receiver, connect_sender

KINDS: dict[str, tuple[HandoffKind, ...]] = {
    "cpu": ("zmq", "shared_memory", "distributed"),
    "cuda": ("zmq", "shared_memory", "cuda_ipc"),  # on one GPU
}
LOOPBACK = "127.0.0.1"
NUM_WARM_UP = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="n_embd")
    parser.add_argument("--tokens", default="1,32,512", help="of a microbatch, by commas")
    parser.add_argument("--compute-ms", type=float, default=10.0, help="what the sender computes before each hop")
    parser.add_argument("--device", choices=KINDS, default="cpu")
    parser.add_argument("--hops", type=int, default=200, help="of each kind and size")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.tokens.split(",")]
    kinds = KINDS[arguments.device]
    print(f"| tokens of {arguments.width} in fp32 | " + " | ".join(f"{kind} µs" for kind in kinds) + " |")
    print("|---" * (1 + len(kinds)) + "|")
    with contextlib.ExitStack() as stack:
        pairs = {kind: stack.enter_context(_pair(kind, arguments.device)) for kind in kinds}
        for num_tokens in sizes:
            hops: dict[HandoffKind, list[float]] = {kind: [] for kind in kinds}
            for index in range(NUM_WARM_UP + arguments.hops):
                for kind, (sender, receiver) in pairs.items():
                    receiver.send(None)
                    sender.send((num_tokens, arguments.width, arguments.compute_ms / 1000))
                    sent_at, begun_at = sender.recv(), receiver.recv()
                    if index >= NUM_WARM_UP:
                        hops[kind].append(1e6 * (begun_at - sent_at))
            print(f"| {num_tokens} | " + " | ".join(_described(hops[kind]) for kind in kinds) + " |")


def _described(hops: list[float]) -> str:
    """Median, and the span in which nine of ten are."""
    low, *_, high = statistics.quantiles(hops, n=20)
    return f"{statistics.median(hops):.0f} ({low:.0f} to {high:.0f})"


@contextlib.contextmanager
def _pair(kind: HandoffKind, device: str) -> Iterator[tuple[Connection, Connection]]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        pipes, processes = [], []
        for run in (_receive, _send):
            ours, theirs = context.Pipe()
            addresses = pipes[0].recv() if pipes else None
            processes.append(
                context.Process(
                    target=run,
                    args=(theirs, kind, Site(torch.device(device), LOOPBACK), directory, addresses),
                    daemon=True,
                )
            )
            processes[-1].start()
            pipes.append(ours)
        try:
            for pipe in pipes:
                pipe.recv()
            yield pipes[1], pipes[0]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _receive(pipe: Connection, kind: HandoffKind, site: Site, directory: str, _: Any) -> None:
    torch.set_num_threads(1)
    link = zmq.Context[zmq.Socket[bytes]]().socket(zmq.PULL)
    address = bind_receiver(link, f"ipc://{directory}/hidden", None)
    end, tensors = listen(kind, link, site)
    pipe.send((address, tensors))
    end.connect(lambda: False)
    pipe.send("connected")
    microbatch_id = 0
    while True:
        pipe.recv()
        received = end.receive(microbatch_id, lambda: False)
        assert received is not None
        hidden = received.hidden.to(site.device)
        _synchronize(site)
        begun_at = time.time()
        hidden.sum().item()
        pipe.send(begun_at)
        microbatch_id += 1


def _send(pipe: Connection, kind: HandoffKind, site: Site, _: str, addresses: tuple[str, str]) -> None:
    torch.set_num_threads(1)
    link = zmq.Context[zmq.Socket[bytes]]().socket(zmq.PUSH)
    connect_sender(link, addresses[0], None)
    end = reach(kind, link, addresses[1], site)
    end.connect(lambda: False)
    pipe.send("connected")
    weights = torch.randn(4096, 4096)  # larger than caches
    microbatch_id = 0
    while True:
        num_tokens, width, compute_s = pipe.recv()
        hidden = torch.randn(num_tokens, width, device=site.device)
        if site.device.type == "cuda":
            torch.cuda._sleep(int(1.5e9 * compute_s))  # cycles
            with _end_noted() as ends:
                end.send(microbatch_id, hidden)
            pipe.send(*ends)
        else:
            until = time.perf_counter() + compute_s
            while time.perf_counter() < until:
                weights.sum()
            sent_at = time.time()
            end.send(microbatch_id, hidden)
            pipe.send(sent_at)
        microbatch_id += 1


@contextlib.contextmanager
def _end_noted() -> Iterator[list[float]]:
    """When the device will have done what it has been given."""
    done = torch.cuda.current_stream().record_event()
    ends: list[float] = []

    def note() -> None:
        done.synchronize()
        ends.append(time.time())

    thread = threading.Thread(target=note)
    thread.start()
    yield ends
    thread.join()


def _synchronize(site: Site) -> None:
    if site.device.type == "cuda":
        torch.cuda.current_stream().synchronize()


if __name__ == "__main__":
    main()
