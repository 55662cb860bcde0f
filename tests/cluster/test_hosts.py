"""The testbed itself, without Ray: hosts that reach each other and nobody else, and leave nothing behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from cluster.testbed.__main__ import CANT_BE_DONE, COMMANDS, obey
from cluster.testbed.host import ROOT, Host
from cluster.testbed.links import Link
from cluster.testbed.measure import measure
from cluster.testbed.service import Service
from cluster.testbed.testbed import Testbed

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("namespaces")]

PORT = 7000
SHORT_S = 0.5


@pytest.fixture(scope="module")
def testbed(namespaces: None) -> Iterator[Testbed]:
    with Testbed(3) as testbed:
        yield testbed


@pytest.fixture(autouse=True)
def _mended(testbed: Testbed) -> None:
    testbed.set_all_links(Link())


def answers(source: Host, target: Host, timeout_s: float = 10.0) -> bool:
    """Whether a connection can be made and brings something back."""
    with target.network(), socket.create_server((target.address, PORT)) as listener, source.network():
        try:
            with socket.create_connection(listener.getsockname(), timeout_s) as client, listener.accept()[0] as server:
                client.sendall(b"hello")
                server.settimeout(timeout_s)
                return server.recv(5) == b"hello"
        except TimeoutError:
            return False


def test_hosts_reach_each_other_by_their_own_addresses(testbed: Testbed) -> None:
    everyone = [*testbed.hosts, testbed.client]
    assert len({host.address for host in everyone}) == 4
    assert all(answers(a, b) for a in everyone for b in everyone)


def test_traffic_stays_inside(testbed: Testbed) -> None:
    """A host has no way out, and this machine none in."""
    host = testbed.hosts[0]
    assert host.run(["ip", "-o", "route"]).split()[:3] == ["10.77.0.0/24", "dev", "eth0"]
    with host.network(), socket.socket() as outbound:
        outbound.settimeout(SHORT_S)
        with pytest.raises(OSError, match="unreachable"):
            outbound.connect(("192.0.2.1", 80))
    with host.network():
        listener = socket.create_server((host.address, PORT))
    with listener, socket.socket() as inbound:
        inbound.settimeout(SHORT_S)
        with suppress(OSError):  # none, if there is one of that address elsewhere
            inbound.connect((host.address, PORT))
        listener.settimeout(SHORT_S)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_hosts_do_not_meet_outside_the_network(testbed: Testbed) -> None:
    """Ports, abstract sockets, temporary files and processes of one are not to be seen from another."""
    a, b = testbed.hosts[:2]
    assert a.run([sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"]).strip() == "/dev/shm"
    for host in (a, b):
        host.run(["sh", "-c", "test ! -e /dev/shm/ours && touch /dev/shm/ours"])
    assert not Path("/dev/shm/ours").exists()
    with ExitStack() as open_sockets:
        for host in (a, b):
            with host.network():
                abstract = open_sockets.enter_context(socket.socket(socket.AF_UNIX))
                abstract.bind("\0ours")  # in use, if they shared it
                open_sockets.enter_context(socket.create_server(("0.0.0.0", PORT)))
    sleeper = a.popen(["sleep", "100"])
    try:
        assert wait_until(lambda: [process.name() for process in a.processes()] == ["sleep"])
        assert b.processes() == []
        assert "sleep" not in b.run(["sh", "-c", "cat /proc/[0-9]*/comm"])
    finally:
        for process in a.processes():
            process.kill()
        sleeper.wait(10)


def test_latency_is_added_and_taken_away(testbed: Testbed) -> None:
    a, b = testbed.hosts[:2]
    testbed.set_link(0, 1, Link(latency_s=0.1))
    began_at = time.monotonic()
    assert answers(a, b)
    assert time.monotonic() - began_at >= 0.3  # SYN, its answer, and the data
    assert answers(a, testbed.hosts[2], SHORT_S)


def test_a_lossy_link_only_costs_time(testbed: Testbed) -> None:
    testbed.set_link(0, 1, Link(loss=0.2))
    before = testbed.counters().num_lost
    while testbed.counters().num_lost < before + 5:
        assert answers(testbed.hosts[0], testbed.hosts[1], 60)


def test_a_cut_link_loses_what_is_on_it_and_no_other(testbed: Testbed) -> None:
    a, b, c = testbed.hosts
    testbed.set_link(0, 1, Link(is_cut=True))
    assert not answers(a, b, SHORT_S)
    assert not answers(b, a, SHORT_S)
    assert answers(a, c)
    assert answers(testbed.client, b)
    testbed.set_link(0, 1, Link())
    assert answers(a, b)


def test_a_killed_host_dies_in_silence() -> None:
    """All its processes at once, and nobody whom it was connected with is told."""
    with Testbed(2) as own:
        a, b = own.hosts
        b.popen(["sleep", "1000"])
        assert wait_until(lambda: len(b.processes()) == 1)
        (sleeper,) = b.processes()
        with b.network():
            listener = socket.create_server((b.address, PORT))
        with a.network():
            client = socket.create_connection((b.address, PORT))
        with listener, client, listener.accept()[0]:
            own.kill_host(1)
            client.settimeout(SHORT_S)
            with pytest.raises(TimeoutError):
                client.recv(1)
        assert wait_until(lambda: not sleeper.is_running())
        assert b.processes() == []
        assert a.run(["echo", "alive"]) == "alive\n"


def test_two_testbeds_do_not_clash(testbed: Testbed) -> None:
    with Testbed(2) as other:
        assert other.hosts[0].address == testbed.hosts[0].address
        assert answers(other.hosts[0], other.hosts[1])
        assert answers(testbed.hosts[0], testbed.hosts[1])
        other.set_all_links(Link(is_cut=True))
        assert answers(testbed.hosts[0], testbed.hosts[1])


def test_commands_do_what_they_say(testbed: Testbed, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of `python -m cluster.testbed run`."""
    service = Service(testbed, Path("no-config.yaml"), Path("no-log"))  # not started
    for line in ("link 0 1 30 1", "cut 1 2"):
        obey(line.split(), testbed, service)
    assert testbed.link(1, 0) == Link(latency_s=0.03, loss=0.01)
    assert testbed.link(2, 1) == Link(is_cut=True)
    obey(["link", "2", "1"], testbed, service)
    assert testbed.link(1, 2) == Link()
    obey(["on", "client", "echo", "here"], testbed, service)
    assert capsys.readouterr().out.strip() == "here"
    obey(["fly", "1"], testbed, service)
    assert capsys.readouterr().out.strip() == COMMANDS
    with pytest.raises(ValueError, match="host 9: must be between 0 and 2"):
        obey(["cut", "0", "9"], testbed, service)
    with pytest.raises(ValueError, match="host -1: must be"):
        obey(["kill", "-1"], testbed, service)


def test_what_can_not_be_done_is_told() -> None:
    """And the testbed goes on: that things are lost is what it is for."""
    with Testbed(2) as testbed:
        service = Service(testbed, Path("no-config.yaml"), Path("no-log"))  # not started, so nothing listens
        with pytest.raises(CANT_BE_DONE, match="Connection refused"):
            obey(["status"], testbed, service)
        obey(["kill", "1"], testbed, service)
        assert not testbed.hosts[1].is_alive
        for command in ("on 1 ls", "ray 1 ray status"):
            with pytest.raises(CANT_BE_DONE, match="host 1 was killed"):
                obey(command.split(), testbed, service)
        obey(["kill", "0"], testbed, service)
        with pytest.raises(CANT_BE_DONE, match="all hosts were killed"):
            obey(["status"], testbed, service)


def test_what_the_testbed_adds_is_measured() -> None:
    lines: list[str] = []
    measure(9000, lines.append)
    assert [line.partition(",")[0] for line in lines] == [
        "round trip of 64 bytes",
        "round trip of 8",
        "round trip of 131",
        "one stream at an MTU of 9",
        "with 30 ms each way",
    ]
    assert all(re.search(r"\d+ (µs|lost)$", line) for line in lines)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(end: signal.Signals) -> None:
    """Whatever ends the process that made the testbed."""
    script = (
        "from cluster.testbed.testbed import Testbed\n"
        "with Testbed(2) as testbed:\n"
        "    for host in testbed.hosts:\n"
        "        host.popen(['sleep', '1000'])\n"
        "        while not host.processes(): pass\n"
        "    print('up', flush=True)\n"
        "    testbed.hosts[0].run(['sleep', '1000'], timeout_s=1000)\n"
    )
    before = left_overs()
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert left_overs() > before
        process.send_signal(end)
        process.wait(20)
    assert wait_until(lambda: left_overs() == before)


def left_overs() -> set[str]:
    """Network namespaces, named or not, of any process; devices of this machine's."""
    namespaces = set()
    for process in psutil.process_iter():
        try:
            namespaces.add(os.readlink(f"/proc/{process.pid}/ns/net"))
        except OSError:
            continue
    named = Path("/run/netns")
    return (
        namespaces
        | {str(path) for path in (named.iterdir() if named.exists() else [])}
        | {name for _, name in socket.if_nameindex()}
        | {f"mount {line}" for line in Path("/proc/self/mounts").read_text().splitlines()}
    )


def wait_until(check, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
