"""Ending `serve run` when what it was started for can't be served.

`serve run config.yaml` submits the config and then sleeps, whatever becomes of it; a broken checkpoint would leave a
process that serves nothing and never ends. It is ended only if the cluster exists for that command alone (the
builder's process descends from it) and nothing is being served, so that a bad update never takes down a running
version, and a cluster started in any other way is left alone.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType

import psutil
import ray

REPLICA_PREFIX = "SERVE_REPLICA::"
"""Of the names of Serve's replica actors."""

LOG_FORWARDING_S = 1.5
"""Ray forwards a worker's output to the terminal with a delay."""


RAY_AGENTS = ("ray::DashboardA", "ray::RuntimeEn")
"""Beginnings of process names, which the kernel cuts."""


def end_serve_run(message: str) -> None:
    """Print `message`; if a `serve run` waits for nothing but this, end it, with an exit status that is not 0."""
    command = next((process for process in psutil.Process().parents() if _is_serve_run(process)), None)
    if command is None or anything_is_served():
        return
    sys.stderr.write(f"ERROR: {message}\n")
    sys.stderr.flush()
    time.sleep(LOG_FORWARDING_S)
    raylet = psutil.Process().parent()
    agents = [process for process in raylet.children() if _is_agent(process)]
    # Of an interrupt it would exit with 0, of SIGTERM print a stack trace, and a hangup may be ignored (nohup).
    # Its cluster dies with it, this process too, but for Ray's agents. They go last: the raylet ends all workers, this
    # one too, as soon as it misses one.
    for process in (command, *agents):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def foreign_listener(port: int) -> psutil.Process | None:
    """A process of this machine that listens on the port and is none of this cluster's.

    Serve's proxies share their port with whoever else is willing to (SO_REUSEPORT): another service there would not
    be noticed, and get a part of the requests.
    """
    raylet = psutil.Process().parent()
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid is not None:
            try:
                process = psutil.Process(connection.pid)
                if raylet not in [process, *process.parents()]:
                    return process
            except psutil.NoSuchProcess:
                continue
    return None


def _is_agent(process: psutil.Process) -> bool:
    try:
        return bool(process.name().startswith(RAY_AGENTS))
    except psutil.NoSuchProcess:
        return False


def _is_serve_run(process: psutil.Process) -> bool:
    try:
        words = [os.path.basename(word) for word in process.cmdline()]
    except psutil.Error:
        return False
    return any(pair == ("serve", "run") for pair in itertools.pairwise(words))


def anything_is_served() -> bool:
    """Whether any replica is alive. Serve's own status knows none of an application whose update is being built."""
    return bool(_replica_names())


def application_being_built() -> str | None:
    """The name of the application that Serve calls the builder for; None where somebody else does.

    Serve tells a builder the arguments, but not the name: that is in the call from which the builder is called.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "build_serve_application":
            name: str = frame.f_locals["name"]
            return name
        frame = frame.f_back
    return None


def num_alive(deployment: str, application: str | None) -> int:
    """Replicas of that deployment of that application; None: of all applications."""
    return num_replicas(_replica_names(), deployment, application)


def num_replicas(actor_names: Iterable[str], deployment: str, application: str | None) -> int:
    if application is None:
        return sum(f"#{deployment}#" in name for name in actor_names)
    return sum(name.startswith(f"{REPLICA_PREFIX}{application}#{deployment}#") for name in actor_names)


def _replica_names() -> list[str]:
    if not ray.is_initialized():
        return []
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if name.startswith(REPLICA_PREFIX)]
