"""What an ingress process knows of its pipelines' replicas.

Serve makes the router itself, so router and engine client meet in one object here: the router is told by Serve who
runs, the engine client by each pipeline whether it is ready and how long its queue is; the router prefers those that
are ready and have the shortest, and the client takes its requests away from those that leave or are not ready.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable

from gptj_serve.types import ModelVersion

SAME_WAIT_S = 1.0
"""Queues that differ by less than that count as equally long: what is known of them is some moments old."""

REFUSAL_COUNTS_S = 2.0
"""So long a queue is taken for as long as its replica told with a refusal. No event stream need be open there, over
which it would tell when the queue is shorter; so after this time it is asked again."""


class Replicas:
    """May be used from several threads: Serve's router has an event loop of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._running: frozenset[str] = frozenset()
        self._recovering: frozenset[str] = frozenset()
        self._queue_waits_s: dict[str, tuple[float, float]] = {}  # by id: how long, and until when that counts
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

    def shortest_wait_s(self) -> float:
        """How long a request would wait at least; 0 where that is not known."""
        with self._lock:
            ids = self._running - self._recovering or self._running
            return min(map(self._wait_s, ids), default=0.0)

    def wait_s(self, replica_id: str) -> float:
        """How long a request would wait there; 0 where that is not known."""
        with self._lock:
            return self._wait_s(replica_id)

    def best(self, replica_ids: Iterable[str]) -> frozenset[str]:
        """Of these, those that are ready and have the shortest queues; all of them if none is ready."""
        with self._lock:
            ids = frozenset(replica_ids)
            ids = ids - self._recovering or ids
            waits_s = {replica_id: self._wait_s(replica_id) for replica_id in ids}
        shortest_s = min(waits_s.values(), default=0.0)
        return frozenset(replica_id for replica_id, wait_s in waits_s.items() if wait_s <= shortest_s + SAME_WAIT_S)

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
            self._queue_waits_s = {id_: wait for id_, wait in self._queue_waits_s.items() if id_ in self._running}
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

    def set_load(self, replica_id: str, *, is_ready: bool, queue_wait_s: float) -> None:
        with self._lock:
            self._recovering = self._recovering - {replica_id} if is_ready else self._recovering | {replica_id}
            self._queue_waits_s[replica_id] = (queue_wait_s, math.inf)

    def refused(self, replica_id: str, queue_wait_s: float) -> None:
        """It had no room for a request."""
        with self._lock:
            if replica_id in self._running:
                self._queue_waits_s[replica_id] = (queue_wait_s, self._clock() + REFUSAL_COUNTS_S)

    def forget(self, replica_id: str) -> None:
        """What it has told of its load, and unless it runs, of its version: nobody tells it any more.

        What is not known is not held against a replica.
        """
        with self._lock:
            self._recovering -= {replica_id}
            self._queue_waits_s.pop(replica_id, None)
            if replica_id not in self._running:
                self._versions = {other: version for other, version in self._versions.items() if other != replica_id}

    def _wait_s(self, replica_id: str) -> float:
        wait_s, until = self._queue_waits_s.get(replica_id, (0.0, 0.0))
        return wait_s if self._clock() < until else 0.0


REPLICAS = Replicas()
"""Those of this process."""
