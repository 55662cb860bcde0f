"""The switch between the testbed's hosts, with socket pairs in place of devices: no root, no namespaces."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from cluster.testbed.links import Command, Counters, Link
from cluster.testbed.switch import Switch, mac_address

BROADCAST = b"\xff" * 6


class Wiring:
    """Three ports; what is sent to one comes out at another."""

    def __init__(self) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(3)]
        self.ends = [ours for ours, _ in pairs]
        for end in self.ends:
            end.settimeout(10)
        for _, theirs in pairs:
            theirs.setblocking(False)
        self._control, commands = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._commands = commands
        switch = Switch({port: theirs.detach() for port, (_, theirs) in enumerate(pairs)}, commands)
        self._thread = threading.Thread(target=switch.run)
        self._thread.start()

    def tell(self, command: Command) -> Counters:
        self._control.send(command.encode())
        return Counters.decode(self._control.recv(4096))

    def send(self, source: int, destination: bytes, text: bytes) -> bytes:
        """The whole frame."""
        frame = destination + mac_address(source) + b"\x08\x00" + text
        self.ends[source].send(frame)
        return frame

    def hears_nothing(self, port: int) -> bool:
        """What was sent before this has had its turn."""
        self.tell(Command())
        time.sleep(0.05)
        self.ends[port].setblocking(False)
        try:
            return not self.ends[port].recv(4096)
        except BlockingIOError:
            return True
        finally:
            self.ends[port].settimeout(10)

    def close(self) -> None:
        self._control.close()
        self._thread.join(10)
        self._commands.close()
        for end in self.ends:
            end.close()
        assert not self._thread.is_alive()


@pytest.fixture
def wiring() -> Iterator[Wiring]:
    wiring = Wiring()
    yield wiring
    wiring.close()


def test_a_frame_goes_to_its_destination_alone(wiring: Wiring) -> None:
    frame = wiring.send(0, mac_address(2), b"to host 2")
    assert wiring.ends[2].recv(4096) == frame
    assert wiring.hears_nothing(1)
    assert wiring.tell(Command()) == Counters(num_forwarded=1, num_bytes=len(frame))


def test_a_broadcast_goes_to_all_others(wiring: Wiring) -> None:
    frame = wiring.send(1, BROADCAST, b"who has 10.77.0.1?")
    assert [wiring.ends[port].recv(4096) for port in (0, 2)] == [frame, frame]
    assert wiring.hears_nothing(1)


def test_latency_delays_both_directions_and_keeps_the_order(wiring: Wiring) -> None:
    wiring.tell(Command([(0, 1, Link(latency_s=0.2))]))
    for source, destination in ((0, 1), (1, 0)):
        sent_at = time.monotonic()
        frames = [wiring.send(source, mac_address(destination), b"%d" % n) for n in range(20)]
        assert [wiring.ends[destination].recv(4096) for _ in frames] == frames
        assert time.monotonic() - sent_at >= 0.2
    wiring.tell(Command([(0, 1, Link(latency_s=30))]))
    wiring.send(0, mac_address(1), b"on its way")
    frame = wiring.send(0, mac_address(2), b"by another link")
    assert wiring.ends[2].recv(4096) == frame
    assert wiring.hears_nothing(1)


def test_a_cut_link_loses_everything_until_it_is_mended(wiring: Wiring) -> None:
    wiring.tell(Command([(1, 0, Link(is_cut=True))]))
    wiring.send(0, mac_address(1), b"lost")
    wiring.send(1, BROADCAST, b"lost for 0 only")
    assert wiring.ends[2].recv(4096).endswith(b"lost for 0 only")
    assert wiring.hears_nothing(1)
    assert wiring.hears_nothing(0)
    assert wiring.tell(Command([(0, 1, Link())])).num_lost == 2
    frame = wiring.send(0, mac_address(1), b"not lost")
    assert wiring.ends[1].recv(4096) == frame


def test_loss_is_of_the_given_share(wiring: Wiring) -> None:
    wiring.tell(Command([(0, 1, Link(loss=0.3))]))
    for number in range(400):
        wiring.send(0, mac_address(1), b"%d" % number)
        if number % 50 == 49:  # a port's own queue is short
            wiring.tell(Command())
            time.sleep(0.01)
            wiring.ends[1].setblocking(False)
            while True:
                try:
                    wiring.ends[1].recv(4096)
                except BlockingIOError:
                    break
    counters = wiring.tell(Command())
    assert counters.num_forwarded + counters.num_lost == 400
    assert 80 < counters.num_lost < 160


def test_an_unplugged_port_hears_and_says_nothing(wiring: Wiring) -> None:
    wiring.tell(Command(unplug=[1]))
    wiring.send(0, mac_address(1), b"to nobody")
    assert wiring.hears_nothing(2)
    assert wiring.tell(Command()).num_lost == 1
    with pytest.raises(OSError, match="refused"):
        wiring.send(1, mac_address(0), b"from nobody")


@pytest.mark.parametrize("values", [{"latency_s": -1}, {"loss": 1.5}, {"latency_s": float("nan")}])
def test_what_is_no_link_is_refused_by_name(values: dict[str, float]) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=f"{name}="):
        Link(**values)
