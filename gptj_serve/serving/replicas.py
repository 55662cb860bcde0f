"""What an ingress process knows of its pipelines' replicas.

Serve makes the router itself, so router and engine client meet in one object here: the router is told by Serve who
runs, the engine client by each pipeline whether it is ready; the router prefers those that are, and the client takes
its requests away from those that leave or are not.
"""

import threading
from collections.abc import Callable, Iterable


class Replicas:
    """May be used from several threads: Serve's router has an event loop of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: frozenset[str] = frozenset()
        self._recovering: frozenset[str] = frozenset()
        self._listeners: list[Callable[[frozenset[str]], None]] = []

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

    def subscribe(self, on_left: Callable[[frozenset[str]], None]) -> None:
        """`on_left` is called, in any thread, with the ids of those that run no longer."""
        with self._lock:
            self._listeners.append(on_left)

    def set_running(self, replica_ids: Iterable[str]) -> None:
        with self._lock:
            before, self._running = self._running, frozenset(replica_ids)
            left = before - self._running
            self._recovering &= self._running
            listeners = list(self._listeners)
        if left:
            for on_left in listeners:
                on_left(left)

    def set_ready(self, replica_id: str, is_ready: bool) -> None:
        with self._lock:
            self._recovering = self._recovering - {replica_id} if is_ready else self._recovering | {replica_id}


REPLICAS = Replicas()
"""Those of this process."""
