"""The processes of a running service by their roles, and what can be done to them."""

import asyncio
import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass
from enum import StrEnum

import psutil


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
    KILL_PIPELINE = "kill pipeline"
    KILL_INGRESS = "kill ingress"
    KILL_PROXY = "kill proxy"
    KILL_CONTROLLER = "kill controller"


ROLES = {
    FaultKind.KILL_STAGE: Role.STAGE,
    FaultKind.PAUSE_STAGE: Role.STAGE,
    FaultKind.HANG_STAGE: Role.STAGE,
    FaultKind.KILL_PIPELINE: Role.PIPELINE,
    FaultKind.KILL_INGRESS: Role.INGRESS,
    FaultKind.KILL_PROXY: Role.PROXY,
    FaultKind.KILL_CONTROLLER: Role.CONTROLLER,
}

CUTS_CONNECTIONS = {FaultKind.KILL_INGRESS, FaultKind.KILL_PROXY}
"""The client's connection ends in these processes: without them it can't be told anything."""

PAUSE_S = 1.0


@dataclass(frozen=True)
class Fault:
    kind: FaultKind
    pid: int
    at: float  # time.monotonic()


class Processes:
    """Those that descend from one `serve run`."""

    def __init__(self, serve_run_pid: int) -> None:
        self._root = psutil.Process(serve_run_pid)

    def of(self, role: Role) -> list[psutil.Process]:
        return [process for process in self._root.children(recursive=True) if _has_role(process, role)]

    def census(self) -> dict[str, int]:
        """How many of each role there are."""
        return {role.name: len(self.of(role)) for role in Role}

    def resources(self) -> dict[str, tuple[int, int]]:
        """Per role: open files and resident bytes of all its processes."""
        return {
            role.name: (
                sum(process.num_fds() for process in self.of(role)),
                sum(process.memory_info().rss for process in self.of(role)),
            )
            for role in Role
        }

    async def commit(self, kind: FaultKind, rng: random.Random) -> Fault | None:
        """Do it to one process of the kind's role; None while there is none."""
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


def _has_role(process: psutil.Process, role: Role) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and " ".join(process.cmdline()).startswith(role)
    except psutil.Error:
        return False
