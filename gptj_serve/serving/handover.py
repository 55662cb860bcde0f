"""`Handover`: new ingresses and new pipelines take over together.

Serve replaces each deployment by itself: an ingress is up in seconds, a pipeline maybe after minutes. An ingress whose
pipelines still load would let requests wait, and one whose pipelines never come would have none that understands it. So
where the model's `text` version changes, a new ingress is not ready before a pipeline of its version has loaded, and a
pipeline that has loaded waits a moment for such an ingress: only then does Serve stop the old ones. Where no ingress of
another version lives, nobody waits.

Replicas tell each other under their actors' names: who is dead no longer counts.
"""

import logging
import time
from typing import Protocol

import ray
from ray.experimental import internal_kv

from gptj_serve.errors import PipelineError

logger = logging.getLogger(__name__)

MAX_CONSTRUCTOR_TRIES = 3
"""Serve starts a replica no more often before it ends a rollout."""

POLL_PERIOD_S = 0.5

INGRESS_TIMEOUT_S = 30.0
"""A pipeline waits no longer: there may be no room for a second ingress."""

TAKEOVER_S = 2.0
"""Then Serve has taken the old ingress out of the proxies' turn."""

_INGRESS, _PIPELINE = "ingress", "pipeline"


class Board(Protocol):
    """Where replicas tell of themselves, and how they see who is alive."""

    def put(self, key: str, value: str) -> None: ...

    def remove(self, key: str) -> None: ...

    def read(self, prefix: str) -> dict[str, str]: ...

    def actor_names(self) -> set[str]:
        """Of all actors that are alive."""
        ...


class Clock(Protocol):
    """The module `time` is one."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


class Handover:
    def __init__(self, application: str, actor_name: str, text_version: str, board: Board, clock: Clock = time) -> None:
        """`actor_name` is that of this replica's actor."""
        self._application = application
        self._actor_name = actor_name
        self._text_version = text_version
        self._board = board
        self._clock = clock

    def ingress_is_built(self, timeout_s: float) -> None:
        """Returns when this ingress may serve: a pipeline of its version has loaded, or no ingress of another lives.

        Raises `PipelineError` where that does not happen in time: Serve then keeps the old ingress, counts a failed
        start, and after some of them ends the rollout. Served by the new one, all requests would wait in vain.
        """
        deadline = self._clock.monotonic() + timeout_s
        while True:
            ingresses, pipelines = self._others(_INGRESS), self._others(_PIPELINE)
            if ingresses <= {self._text_version} or self._text_version in pipelines:
                break
            if self._clock.monotonic() >= deadline:
                raise PipelineError(
                    f"no pipeline of this version has loaded within {timeout_s:g} s; the ingresses of the old version "
                    "serve on: mend what keeps the pipelines from starting, or deploy the old config again"
                )
            self._clock.sleep(POLL_PERIOD_S)
        self._tell(_INGRESS)

    def pipeline_is_loaded(self) -> None:
        """Returns when this pipeline may serve: an ingress of its version is there, or none of another one.

        If it came just now, a moment later: with the old pipelines an old ingress loses all that it could ask, so it
        should get no requests any more.
        """
        self._tell(_PIPELINE)
        deadline = self._clock.monotonic() + INGRESS_TIMEOUT_S
        has_waited = False
        while (ingresses := self._others(_INGRESS)) and self._text_version not in ingresses:
            if self._clock.monotonic() >= deadline:
                logger.warning("no ingress of the new version came within %.0f s", INGRESS_TIMEOUT_S)
                return
            self._clock.sleep(POLL_PERIOD_S)
            has_waited = True
        if has_waited and ingresses:
            self._clock.sleep(TAKEOVER_S)

    def _tell(self, kind: str) -> None:
        self._board.put(f"{self._application}/{kind}/{self._actor_name}", self._text_version)

    def _others(self, kind: str) -> set[str]:
        """The text versions of those that have told of themselves and are alive."""
        prefix = f"{self._application}/{kind}/"
        notices = self._board.read(prefix)
        alive = self._board.actor_names() if notices else set()  # asked after, so that none who told is missed
        for key in [key for key in notices if key.removeprefix(prefix) not in alive]:
            self._board.remove(key)
            del notices[key]
        return {version for key, version in notices.items() if key.removeprefix(prefix) != self._actor_name}


class RayBoard:
    """The key-value store of Ray's GCS."""

    _NAMESPACE = b"gptj_serve"

    def put(self, key: str, value: str) -> None:
        internal_kv._internal_kv_put(key.encode(), value.encode(), overwrite=True, namespace=self._NAMESPACE)

    def remove(self, key: str) -> None:
        internal_kv._internal_kv_del(key.encode(), namespace=self._NAMESPACE)

    def read(self, prefix: str) -> dict[str, str]:
        values = {}
        for key in internal_kv._internal_kv_list(prefix.encode(), namespace=self._NAMESPACE):
            value = internal_kv._internal_kv_get(key, namespace=self._NAMESPACE)
            if value is not None:  # it may just have been removed
                values[key.decode()] = value.decode()
        return values

    def actor_names(self) -> set[str]:
        return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}


def own_handover(text_version: str) -> Handover:
    """Of the replica that runs in this process."""
    replica_id = ray.serve.get_replica_context().replica_id
    return Handover(replica_id.deployment_id.app_name, replica_id.to_full_id_str(), text_version, RayBoard())
