"""Every kind of handoff between two processes: what is sent arrives as it was, and nobody waits who is told to stop."""

import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from gptj_serve.config import HandoffKind
from gptj_serve.errors import PipelineError
from tests.pipeline.neighbours import (
    KINDS,
    Neighbour,
    device_of,
    hidden_of,
    link_address,
    never,
    open_receiver,
    open_sender,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOON_S = 2.0

pytestmark = pytest.mark.parametrize("kind", KINDS)


def random_sizes(seed: int, count: int) -> list[tuple[int, int, int, torch.dtype]]:
    """Mostly decode steps, some prompts; some larger than all before, so that memory must grow."""
    rng = random.Random(seed)
    return [
        (n, rng.choice([1, 2, 3, 7, 33, rng.randrange(1, 900)]), rng.choice([1, 5, 64, 1000]), rng.choice(DTYPES))
        for n in range(count)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_sent_arrives_as_it_was(kind: HandoffKind, tmp_path: Path, seed: int) -> None:
    sizes = random_sizes(seed, 60)
    with open_receiver(kind, link_address(tmp_path)) as (end, addresses), Neighbour("sender", kind, addresses) as other:
        end.connect(never)
        other.tell(5, sizes)
        for microbatch_id, size in enumerate(sizes, start=5):
            before = time.time()
            received = end.receive(microbatch_id, never)
            assert received is not None
            assert received.hidden.dtype == size[3]
            assert torch.equal(received.hidden.cpu(), hidden_of(*size))
            assert received.sent_at <= time.time()
            assert before - received.sent_at < 60
        assert [other.answer(), other.answer()] == ["connected", "sent"]


def test_a_sender_may_be_ahead_of_its_receiver(kind: HandoffKind, tmp_path: Path) -> None:
    with Neighbour("receiver", kind, link_address(tmp_path)) as other, open_sender(kind, other.answer()) as end:
        end.connect(never)
        for microbatch_id in range(3):
            end.send(microbatch_id, torch.full((3, 4), float(microbatch_id), device=device_of(kind)))
        other.tell(0, 3)
        answers = [torch.frombuffer(bytearray(other.answer()), dtype=torch.float32) for _ in range(3)]
        assert [answer.unique().tolist() for answer in answers] == [[0.0], [1.0], [2.0]]


def test_what_was_received_stays_until_the_next_one(kind: HandoffKind, tmp_path: Path) -> None:
    """Also while the sender goes on, as far as it may."""
    sizes = [(seed, 3, 5, torch.float32) for seed in range(12)]
    with open_receiver(kind, link_address(tmp_path)) as (end, addresses), Neighbour("sender", kind, addresses) as other:
        end.connect(never)
        other.tell(0, sizes)
        for microbatch_id, size in enumerate(sizes):
            received = end.receive(microbatch_id, never)
            assert received is not None
            time.sleep(0.01)
            assert torch.equal(received.hidden.cpu(), hidden_of(*size))


def test_another_microbatch_than_the_due_one_is_an_error(kind: HandoffKind, tmp_path: Path) -> None:
    with open_receiver(kind, link_address(tmp_path)) as (end, addresses), Neighbour("sender", kind, addresses) as other:
        end.connect(never)
        other.tell(6, [(0, 1, 4, torch.float32)])
        with pytest.raises(PipelineError, match="microbatch 6 came when 5 was due"):
            end.receive(5, never)


def test_a_neighbour_that_hangs_is_not_waited_for_once_told_to_stop(kind: HandoffKind, tmp_path: Path) -> None:
    with open_receiver(kind, link_address(tmp_path)) as (end, addresses), Neighbour("sender", kind, addresses) as other:
        end.connect(never)
        other.signal(signal.SIGSTOP)
        stopping = threading.Event()

        def stop() -> None:
            stopping.set()
            end.abort()

        timer = threading.Timer(0.3, stop)
        timer.start()
        before = time.monotonic()
        assert end.receive(0, stopping.is_set) is None
        assert time.monotonic() - before < SOON_S
        timer.join()
