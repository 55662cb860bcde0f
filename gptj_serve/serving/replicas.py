"""What an ingress process knows of its pipelines' replicas.

Serve makes the router itself, so router and engine client meet in one object here: the router is told by Serve who
runs, the engine client by each pipeline whether it is ready; the router prefers those that are, and the client takes
its requests away from those that leave or are not.
"""

import threading
from collections.abc import Callable, Iterable

from gptj_serve.types import ModelVersion


class Replicas:
    """May be used from several threads: Serve's router has an event loop of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: frozenset[str] = frozenset()
        self._recovering: frozenset[str] = frozenset()
        self._versions: dict[str, ModelVersion] = {}
        self._listeners: list[Callable[[frozenset[str]], None]] = []
        self._arrival_listeners: list[Callable[[frozenset[str]], None]] = []

    @property
    def running(self) -> frozenset[str]:
        """Ids of those that Serve sends requests to."""
        return self._running

    @property
    def recovering(self) -> frozenset[str]:
        """Ids of those that have lost a stage, and are not ready yet."""
        return self._recovering

    def others(self, replica_id: str) -> frozenset[str]:
        """Who could take over from this one at once."""
        return self._running - self._recovering - {replica_id}

    def version(self, replica_id: str) -> ModelVersion | None:
        """Which version of the model it serves, as far as it has told."""
        return self._versions.get(replica_id)

    def subscribe(self, on_left: Callable[[frozenset[str]], None]) -> None:
        """`on_left` is called, in any thread, with the ids of those that run no longer."""
        with self._lock:
            self._listeners.append(on_left)

    def subscribe_arrivals(self, on_arrived: Callable[[frozenset[str]], None]) -> None:
        """`on_arrived` is called, in any thread, with the ids of those that have come, and now of those there are."""
        with self._lock:
            self._arrival_listeners.append(on_arrived)
            running = self._running
        if running:
            on_arrived(running)

    def set_running(self, replica_ids: Iterable[str]) -> None:
        with self._lock:
            before, self._running = self._running, frozenset(replica_ids)
            left, arrived = before - self._running, self._running - before
            self._recovering &= self._running
            listeners, arrival_listeners = list(self._listeners), list(self._arrival_listeners)
        if arrived:
            for on_arrived in arrival_listeners:
                on_arrived(arrived)
        if left:
            for on_left in listeners:
                on_left(left)

    def set_version(self, replica_id: str, version: ModelVersion) -> None:
        with self._lock:
            self._versions = self._versions | {replica_id: version}

    def forget(self, replica_id: str) -> None:
        """What it has told, unless it runs."""
        with self._lock:
            if replica_id not in self._running:
                self._versions = {other: version for other, version in self._versions.items() if other != replica_id}

    def set_ready(self, replica_id: str, is_ready: bool) -> None:
        with self._lock:
            self._recovering = self._recovering - {replica_id} if is_ready else self._recovering | {replica_id}


REPLICAS = Replicas()
"""Those of this process."""
