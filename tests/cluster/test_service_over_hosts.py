"""One pipeline over several hosts: the same tokens as of one process, closed to strangers, and nothing lost.

The tests share a service, and go from what harms least to what leaves a host fewer.
"""

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import httpx
import psutil
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from cluster.testbed.host import ROOT, Host
from cluster.testbed.links import Link
from cluster.testbed.service import Service, service_config
from cluster.testbed.testbed import Testbed
from gptj_serve.pipeline.sockets import CurveKeys, connect_sender
from tests.chaos.faults import Role
from tests.chaos.harness import call_once
from tests.chaos.traffic import Call, Outcome, Record, calls, undisturbed_answers
from tests.cluster.one_process import one_process

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("namespaces"), pytest.mark.timeout(240)]

NUM_HOSTS = 4
NUM_STAGES = 3
NUM_CALLS = 200
CONCURRENCY = 12
HEAD = 0
"""The clients' way in, and Ray's head: the one host that is never lost here."""

CUT_S = 8.0
"""Longer than it takes to notice (`LINK_TIMEOUT_S`), so that the pipeline comes back while the link is still cut."""

MAX_RECOVERY_S = 60.0
"""An answer that takes no turn for the better by then hangs."""


class Deployment:
    """A service with the stages of its one pipeline on different hosts."""

    def __init__(self, testbed: Testbed, service: Service) -> None:
        self.testbed = testbed
        self.service = service

    @property
    def stage_hosts(self) -> list[int]:
        """In the stages' order."""
        addresses = [host.address for host in self.testbed.hosts]
        (pipeline,) = self.service.pipelines(HEAD)
        return [addresses.index(stage["node_ip"]) for stage in pipeline["stages"]]

    @property
    def engine_host(self) -> int:
        (found,) = [index for index, host in enumerate(self.testbed.hosts) if _has(host, Role.PIPELINE)]
        return found

    def is_whole(self) -> bool:
        with suppress(httpx.HTTPError, ValueError):
            pipelines = self.service.pipelines(HEAD)
            return [pipeline["is_ready"] for pipeline in pipelines] == [True]
        return False


@pytest.fixture(scope="module")
def deployment(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("cluster")
    pipeline = {"num_stages": NUM_STAGES, "placement_strategy": "SPREAD"}
    config = service_config(NUM_HOSTS, directory, ROOT / "deployments" / "gptj.yaml", pipeline)
    with Testbed(NUM_HOSTS) as testbed, Service(testbed, config, directory / "serve.log") as service:
        yield Deployment(testbed, service)


@pytest.fixture(scope="module")
def wanted() -> list[Call]:
    return calls(random.Random(9), NUM_CALLS)


@pytest.fixture(scope="module")
def expected(wanted: list[Call]) -> list[Any]:
    async def ask() -> list[Any]:
        async with one_process() as client:
            return await undisturbed_answers(client, wanted)

    return asyncio.run(ask())


def test_stages_are_on_different_hosts_and_an_ingress_on_each(deployment: Deployment) -> None:
    assert len(set(deployment.stage_hosts)) == NUM_STAGES
    assert [_count(host, Role.INGRESS) for host in deployment.testbed.hosts] == [1] * NUM_HOSTS
    assert [_count(host, Role.PROXY) for host in deployment.testbed.hosts] == [1] * NUM_HOSTS


def test_answers_equal_those_of_one_process(deployment: Deployment, wanted: list[Call], expected: list[Any]) -> None:
    """Each of 200, over the ingresses of all hosts in turn."""
    records: list[Record] = []

    async def ask() -> None:
        slots = asyncio.Semaphore(CONCURRENCY)

        async def one(index: int) -> None:
            async with slots:
                url = deployment.service.url(index % NUM_HOSTS)
                await call_once(url, wanted[index], expected[index], records)

        await asyncio.gather(*map(one, range(NUM_CALLS)))

    with deployment.testbed.client.network():
        asyncio.run(ask())
    assert _not_equal(records) == []
    assert len(records) == NUM_CALLS
    assert {record.call.path for record in records} >= {"/generate", "/classify", "/qa", "/v1/completions"}
    assert sum(record.call.is_streamed for record in records) > NUM_CALLS / 10


def test_strangers_on_other_hosts_are_refused(deployment: Deployment) -> None:
    """By every ZeroMQ port of every stage, whether they have no keys or others."""
    (pipeline,) = deployment.service.pipelines()
    network = deployment.testbed.client.network
    with network():
        for stage, index in zip(pipeline["stages"], deployment.stage_hosts, strict=True):
            host = deployment.testbed.hosts[index]
            ports = [port for port in _listening(host, stage["pid"]) if _speaks_zeromq(host.address, port)]
            assert len(ports) == 2, f"{ports}: for steps and for hidden states"
            for port in ports:
                for keys in (None, CurveKeys.generate()):
                    assert not _is_let_in(f"tcp://{host.address}:{port}", keys)
    assert deployment.is_whole()


def test_a_link_that_is_cut_and_mended_loses_nothing(
    deployment: Deployment, wanted: list[Call], expected: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Between two stages that follow each other, in mid-stream; nobody is told."""
    a, b = deployment.stage_hosts[:2]

    async def cut() -> None:
        deployment.testbed.set_link(a, b, Link(is_cut=True))
        await asyncio.sleep(CUT_S)
        deployment.testbed.set_link(a, b, Link())

    pause_s = _survive(deployment, wanted, expected, cut)
    with capsys.disabled():
        print(f"\na link cut for {CUT_S:.0f} s: tokens go on {pause_s:.1f} s after the cut")


def test_a_killed_host_loses_nothing(
    deployment: Deployment, wanted: list[Call], expected: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """That of a stage, without engine or clients. Its stage is started again on a host that is left."""
    before = deployment.stage_hosts
    lost = next(index for index in before if index not in (HEAD, deployment.engine_host))

    async def kill() -> None:
        deployment.testbed.kill_host(lost)

    pause_s = _survive(deployment, wanted, expected, kill)
    after = deployment.stage_hosts
    with capsys.disabled():
        print(f"\nthe host of a stage killed: tokens go on {pause_s:.1f} s later; stages on {before}, then {after}")
    assert lost not in after


def _survive(deployment: Deployment, wanted: Sequence[Call], expected: Sequence[Any], harm: Any) -> float:
    """Do it to a service under load; no answer may be lost or changed. Returns for how many seconds no token came."""
    records: list[Record] = []
    url = deployment.service.url(HEAD)

    async def load() -> float:
        is_over = asyncio.Event()

        async def worker(number: int) -> None:
            rng = random.Random(number)
            while not is_over.is_set():
                index = rng.randrange(len(wanted))
                await call_once(url, wanted[index], expected[index], records)

        async with asyncio.TaskGroup() as workers:
            for number in range(CONCURRENCY):
                workers.create_task(worker(number))
            await asyncio.sleep(2)
            harmed_at = time.monotonic()
            await harm()
            back_at = await _first_after_silence(records, harmed_at)
            await asyncio.sleep(2)
            is_over.set()
        return back_at - harmed_at

    with deployment.testbed.client.network():
        pause_s = asyncio.run(load())
    assert _not_equal(records) == []
    assert any(record.arrivals for record in records), "no stream was among them"
    assert deployment.is_whole()
    return pause_s


async def _first_after_silence(records: Sequence[Record], since: float, silence_s: float = 2.0) -> float:
    """When the first event came after a pause of all streams. Raises `AssertionError` if none does."""
    deadline = since + MAX_RECOVERY_S
    while time.monotonic() < deadline:
        arrivals = sorted(at for record in records for at in record.arrivals if at > since)
        for before, at in zip([since, *arrivals], arrivals, strict=False):
            if at - before > silence_s:
                return at
        await asyncio.sleep(0.1)
    raise AssertionError(f"no token for {MAX_RECOVERY_S} s, or no pause at all")


def _not_equal(records: Sequence[Record]) -> list[str]:
    return [f"{r.outcome}: {r.call}: {r.detail[:500]}" for r in records if r.outcome is not Outcome.EQUAL]


def _count(host: Host, role: Role) -> int:
    count = 0
    for process in host.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            count += " ".join(process.cmdline()).startswith(role)
    return count


def _has(host: Host, role: Role) -> bool:
    return _count(host, role) > 0


def _listening(host: Host, pid: int) -> list[int]:
    """The TCP ports that a process listens on, by its number on the host."""
    lines = host.run(["ss", "-Hltnp"]).splitlines()
    return [int(line.split()[3].rsplit(":", 1)[1]) for line in lines if f"pid={pid}," in line]


def _speaks_zeromq(address: str, port: int) -> bool:
    """A ZMTP greeting begins with this byte; Ray's gRPC does not."""
    with socket.create_connection((address, port), timeout=5) as connection:
        connection.sendall(b"\xff" + bytes(8) + b"\x7f")
        return connection.recv(1) == b"\xff"


def _is_let_in(address: str, keys: CurveKeys | None) -> bool:
    """Whether the handshake succeeds. It must end, one way or the other."""
    context = zmq.Context[zmq.Socket[bytes]]()
    try:
        stranger = context.socket(zmq.PUSH)
        events = stranger.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED)
        connect_sender(stranger, address, keys)
        assert events.poll(10_000), "neither let in nor refused"
        return bool(recv_monitor_message(events)["event"] == zmq.Event.HANDSHAKE_SUCCEEDED)
    finally:
        context.destroy(linger=0)
