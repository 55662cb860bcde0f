"""Hosts to try things on.

python -m cluster.testbed run --num-hosts 3 --num-stages 3 --placement-strategy SPREAD --latency-ms 30
python -m cluster.testbed measure
"""

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import httpx
import typer

from cluster.testbed.host import ROOT
from cluster.testbed.links import Link
from cluster.testbed.measure import measure as measure_switch
from cluster.testbed.service import Service, service_config
from cluster.testbed.testbed import MTU, Testbed

app = typer.Typer(add_completion=False, help=__doc__)

COMMANDS = """\
link A B [LATENCY_MS [LOSS_PERCENT]]   set the link between two hosts; without numbers, mend it
cut A B                                lose everything between two hosts
kill A                                 end a host
on A COMMAND...                        run a command on a host: its network, its /dev/shm; `on client COMMAND...`
ray A COMMAND...                       as `on`, as a client of the Ray cluster: ray 0 ray status
status                                 stages, their hosts, the links, the switch
Ctrl-D                                 end everything"""

CANT_BE_DONE = (ValueError, IndexError, RuntimeError, OSError, subprocess.TimeoutExpired, httpx.HTTPError)
"""What a command may end with, as hosts and links that are lost are what the testbed is for."""


@app.command()
def run(
    num_hosts: Annotated[int, typer.Option(help="Each with an ingress; the first is Ray's head.")] = 3,
    config: Annotated[Path, typer.Option(help="A Serve config file.")] = ROOT / "deployments" / "gptj.yaml",
    num_stages: Annotated[int | None, typer.Option(help="Instead of the config's.")] = None,
    placement_strategy: Annotated[str | None, typer.Option(help="Instead of the config's: PACK, SPREAD, ...")] = None,
    num_cpus: Annotated[int, typer.Option(help="That Ray may reserve on each host.")] = 2,
    latency_ms: Annotated[float, typer.Option(help="Between any two hosts, one way.")] = 0.0,
    loss_percent: Annotated[float, typer.Option(help="Of frames, between any two hosts.")] = 0.0,
    mtu: int = MTU,
) -> None:
    """Start a service over several hosts, and take commands until the end of the input."""
    with tempfile.TemporaryDirectory(prefix="testbed-") as work, Testbed(num_hosts, mtu) as testbed:
        options = {"num_stages": num_stages, "placement_strategy": placement_strategy}
        given = {name: value for name, value in options.items() if value is not None}
        file = service_config(num_hosts, Path(work), config, given)
        with Service(testbed, file, Path(work) / "serve.log", num_cpus) as service:
            testbed.set_all_links(Link(latency_ms / 1e3, loss_percent / 100))
            _show_status(testbed, service)
            print(COMMANDS)
            for line in sys.stdin:
                try:
                    obey(shlex.split(line), testbed, service)
                except CANT_BE_DONE as error:
                    print(error)


@app.command()
def measure(mtu: int = MTU) -> None:
    """Round trips and throughput between two hosts, beside those on one."""
    measure_switch(mtu, print)


def obey(words: list[str], testbed: Testbed, service: Service) -> None:
    """One of `COMMANDS`. Raises one of `CANT_BE_DONE`."""
    match words:
        case []:
            pass
        case ["link", a, b, *numbers] if len(numbers) <= 2:
            latency_ms, loss_percent = [*map(float, numbers), 0.0, 0.0][:2]
            testbed.set_link(int(a), int(b), Link(latency_ms / 1e3, loss_percent / 100))
        case ["cut", a, b]:
            testbed.set_link(int(a), int(b), Link(is_cut=True))
        case ["kill", a]:
            testbed.kill_host(int(a))
        case ["on", a, *command] if command:
            print((testbed.client if a == "client" else testbed.hosts[int(a)]).run(command))
        case ["ray", a, *command] if command:
            print(service.run_with_ray(int(a), *command))
        case ["status"]:
            _show_status(testbed, service)
        case _:
            print(COMMANDS)


def _show_status(testbed: Testbed, service: Service) -> None:
    index = next((index for index, host in enumerate(testbed.hosts) if host.is_alive), None)
    if index is None:
        raise RuntimeError("all hosts were killed")
    for pipeline in service.pipelines(index):
        ready = "ready" if pipeline["is_ready"] else "not ready"
        stages = ", ".join(f"layers {first} to {end - 1} on {ip}" for first, end, ip in _stages(pipeline))
        print(f"pipeline {pipeline['replica_id']} is {ready}: {stages}")
    for number, host in enumerate(testbed.hosts):
        url = f"{service.url(number)} (from the client: on client curl ...)" if host.is_alive else "killed"
        print(f"{host.name}: {url}; " + ", ".join(f"to {b}: {testbed.link(number, b)}" for b in range(number)))
    print(testbed.counters())


def _stages(pipeline: dict[str, list[dict[str, object]]]) -> list[tuple[int, int, object]]:
    return [(*stage["layers"], stage["node_ip"]) for stage in pipeline["stages"]]  # type: ignore[misc]


if __name__ == "__main__":
    app()
