"""What only a handoff by torch.distributed can meet with: a neighbour that doesn't come, and one that falls silent."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from gptj_serve.errors import PipelineError
from gptj_serve.pipeline.distributed_handoff import DistributedReceiver, DistributedSender
from gptj_serve.pipeline.handoff import HiddenHeader
from gptj_serve.pipeline.sockets import connect_sender
from gptj_serve.pipeline.stage_loop import StageLoop
from gptj_serve.pipeline.step_links import StepLinks
from tests.pipeline.neighbours import Neighbour, link_address, never, open_receiver
from tests.pipeline.scripted_stages import ScriptedRunner

CPU = torch.device("cpu")


@pytest.fixture
def link() -> Iterator[zmq.Socket[bytes]]:
    context = zmq.Context[zmq.Socket[bytes]]()
    yield context.socket(zmq.PULL)
    context.destroy(linger=0)


def test_a_sender_that_does_not_come_is_not_waited_for_long(link: zmq.Socket[bytes]) -> None:
    receiver = DistributedReceiver(link, "127.0.0.1", CPU, connect_timeout_s=1.0)
    before = time.monotonic()
    with pytest.raises(PipelineError, match="no process group between two neighbours"):
        receiver.connect(never)
    assert time.monotonic() - before < 10
    receiver.close()


def test_a_receiver_that_does_not_come_is_not_waited_for_long(link: zmq.Socket[bytes]) -> None:
    """Its store is there."""
    receiver = DistributedReceiver(link, "127.0.0.1", CPU)
    sender = DistributedSender(link, receiver.address, "127.0.0.1", CPU, connect_timeout_s=1.0)
    before = time.monotonic()
    with pytest.raises(PipelineError, match="no process group between two neighbours"):
        sender.connect(never)
    assert time.monotonic() - before < 10
    sender.close()
    receiver.close()


def test_a_store_that_is_gone_is_told(link: zmq.Socket[bytes]) -> None:
    receiver = DistributedReceiver(link, "127.0.0.1", CPU)
    address = receiver.address
    receiver.close()
    sender = DistributedSender(link, address, "127.0.0.1", CPU, connect_timeout_s=1.0)
    with pytest.raises(PipelineError, match="the next stage's store can't be reached"):
        sender.connect(never)
    sender.close()


def test_a_header_without_what_it_announces_is_an_error_in_the_end(tmp_path: Path) -> None:
    """As of a sender that is killed or stopped between the two: the wait is bounded by what a link may take."""
    with (
        open_receiver("distributed", link_address(tmp_path)) as (end, addresses),
        Neighbour("sender", "distributed", addresses) as other,
    ):
        end.connect(never)
        assert other.answer() == "connected"
        context = zmq.Context[zmq.Socket[bytes]]()
        push = context.socket(zmq.PUSH)
        connect_sender(push, addresses[0], None)
        push.send(msgspec.msgpack.encode(HiddenHeader(0, "float32", [2, 3], time.time())))
        other.process.kill()
        with pytest.raises(PipelineError, match="hidden states can't be received"):
            end.receive(0, never)
        context.destroy(linger=0)


def test_a_stage_is_not_waited_for_whose_neighbour_hangs_while_they_connect(tmp_path: Path) -> None:
    """Also without a time-out of the handoff's own, which is longer here."""
    first, second = (StageLoop(ScriptedRunner(index, CPU), None, max_connect_s=0.5) for index in range(2))
    addresses = second.bind(f"ipc://{tmp_path}/1", "distributed")
    first.bind(f"ipc://{tmp_path}/0")
    first.start(addresses.hidden, "distributed", addresses.tensors)
    with pytest.raises(PipelineError, match=r"no connection to the stages beside it within 0.5 s"):
        first.wait_until_linked()
    links = StepLinks(None, step_timeout_s=10)
    second.start(links.bind(f"ipc://{tmp_path}/results"))  # it goes on
    first.wait_until_linked()
    for loop in (first, second):
        loop.stop()
    links.close()
