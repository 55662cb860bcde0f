"""The processes of a running service by their roles, and what can be done to them."""

import asyncio
import contextlib
import math
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

import psutil

from tests.chaos import links


class Role(StrEnum):
    """Ray sets these as the beginning of its workers' process titles."""

    STAGE = "ray::GPTJStage"
    PIPELINE = "ray::ServeReplica:gptj:Pipeline"
    INGRESS = "ray::ServeReplica:gptj:Ingress"
    PROXY = "ray::ProxyActor"
    CONTROLLER = "ray::ServeController"


class FaultKind(StrEnum):
    KILL_STAGE = "kill stage"
    PAUSE_STAGE = "pause stage"  # shorter than the step timeout
    HANG_STAGE = "hang stage"  # for good
    CUT_LINK = "cut link"  # between engine and stages, while both its ends live
    KILL_PIPELINE = "kill pipeline"
    KILL_INGRESS = "kill ingress"
    KILL_PROXY = "kill proxy"
    KILL_CONTROLLER = "kill controller"


ROLES = {
    FaultKind.KILL_STAGE: Role.STAGE,
    FaultKind.PAUSE_STAGE: Role.STAGE,
    FaultKind.HANG_STAGE: Role.STAGE,
    FaultKind.CUT_LINK: Role.STAGE,
    FaultKind.KILL_PIPELINE: Role.PIPELINE,
    FaultKind.KILL_INGRESS: Role.INGRESS,
    FaultKind.KILL_PROXY: Role.PROXY,
    FaultKind.KILL_CONTROLLER: Role.CONTROLLER,
}

CUTS_CONNECTIONS = {FaultKind.KILL_INGRESS, FaultKind.KILL_PROXY}
"""The client's connection ends in these processes: without them it can't be told anything."""

PAUSE_S = 1.0


@dataclass
class Fault:
    """Times are those of `time.monotonic()`."""

    kind: FaultKind
    pid: int
    at: float
    detail: str = ""
    repaired_at: float = math.inf  # of those that cut connections: when clients could connect and be answered again


@dataclass(frozen=True)
class Resources:
    """Of all processes of one role."""

    num_processes: int
    num_files: int
    num_sockets: int
    num_threads: int
    memory_bytes: int  # resident


class Processes:
    """Those that descend from one `serve run`."""

    def __init__(self, serve_run_pid: int) -> None:
        self._root = psutil.Process(serve_run_pid)

    def all(self) -> list[psutil.Process]:
        return list(self._root.children(recursive=True))

    def of(self, role: Role) -> list[psutil.Process]:
        return [process for process in self.all() if _has_role(process, role)]

    def census(self) -> dict[str, int]:
        """How many of each role there are."""
        return {role.name: len(self.of(role)) for role in Role}

    def resources(self) -> dict[str, Resources]:
        """By the roles' names."""
        return {role.name: _sum([resources_of(process) for process in self.of(role)]) for role in Role}

    async def commit(self, kind: FaultKind, rng: random.Random) -> Fault | None:
        """Do it to one process of the kind's role; None while there is none."""
        if kind is FaultKind.CUT_LINK:
            return self._cut_link(rng)
        candidates = self.of(ROLES[kind])
        if not candidates:
            return None
        victim = rng.choice(candidates)
        fault = Fault(kind, victim.pid, time.monotonic())
        if kind in (FaultKind.PAUSE_STAGE, FaultKind.HANG_STAGE):
            os.kill(victim.pid, signal.SIGSTOP)
        else:
            os.kill(victim.pid, signal.SIGKILL)
        if kind is FaultKind.PAUSE_STAGE:
            await asyncio.sleep(PAUSE_S)
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.resume()
        return fault

    def _cut_link(self, rng: random.Random) -> Fault | None:
        """Of any pipeline: the receiver is a stage or, of results, the engine."""
        standing = links.links_of(process.pid for role in (Role.STAGE, Role.PIPELINE) for process in self.of(role))
        if not standing:
            return None
        link = rng.choice(standing)
        fault = Fault(FaultKind.CUT_LINK, link.pid, time.monotonic(), link.name)
        return fault if links.cut(link) else None


def resources_of(process: psutil.Process) -> Resources:
    """Raises `psutil.Error` when it has ended."""
    num_sockets = 0
    try:
        for number in os.listdir(f"/proc/{process.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                num_sockets += os.readlink(f"/proc/{process.pid}/fd/{number}").startswith("socket:")
    except OSError:
        raise psutil.NoSuchProcess(process.pid) from None
    with process.oneshot():
        return Resources(1, process.num_fds(), num_sockets, process.num_threads(), process.memory_info().rss)


def _sum(several: Sequence[Resources]) -> Resources:
    return Resources(*(sum(getattr(one, field.name) for one in several) for field in fields(Resources)))


def _has_role(process: psutil.Process, role: Role) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and " ".join(process.cmdline()).startswith(role)
    except psutil.Error:
        return False
