"""`Handover`: new ingresses and new pipelines take over together.

Serve replaces each deployment by itself: an ingress is up in seconds, a pipeline maybe after minutes. An ingress whose
pipelines still load would let requests wait, and one whose pipelines never come would have none that understands it. So
where the model's `text` version changes, a new ingress is not ready before a pipeline of its version has loaded, and a
pipeline that has loaded waits a moment for such an ingress: only then does Serve stop the old ones.

Replicas tell each other in the key-value store of Ray's GCS, under their actors' names: who is dead no longer counts.
"""

import logging
import time

import ray
from ray.experimental import internal_kv

logger = logging.getLogger(__name__)

POLL_PERIOD_S = 0.2

INGRESS_TIMEOUT_S = 30.0
"""A pipeline waits no longer: there may be no room for a second ingress."""

_NAMESPACE = b"gptj_serve"
_INGRESS, _PIPELINE = "ingress", "pipeline"


class Handover:
    def __init__(self, application: str, actor_name: str, text_version: str) -> None:
        """`actor_name` is that of this replica's actor."""
        self._application = application
        self._actor_name = actor_name
        self._text_version = text_version

    def ingress_is_built(self) -> None:
        """Returns when this ingress may serve: a pipeline of its version has loaded, or there is no other ingress."""
        while self._others(_INGRESS) and self._text_version not in self._others(_PIPELINE).values():
            time.sleep(POLL_PERIOD_S)
        self._tell(_INGRESS)

    def pipeline_is_loaded(self) -> None:
        """Returns when this pipeline may serve: an ingress of its version is there, or none of another one."""
        self._tell(_PIPELINE)
        deadline = time.monotonic() + INGRESS_TIMEOUT_S
        while (versions := self._others(_INGRESS)) and self._text_version not in versions.values():
            if time.monotonic() > deadline:
                logger.warning("no ingress of the new version came within %.0f s", INGRESS_TIMEOUT_S)
                return
            time.sleep(POLL_PERIOD_S)

    def _tell(self, kind: str) -> None:
        key = f"{self._application}/{kind}/{self._actor_name}".encode()
        internal_kv._internal_kv_put(key, self._text_version.encode(), overwrite=True, namespace=_NAMESPACE)

    def _others(self, kind: str) -> dict[str, str]:
        """Actor name → text version of those that have told of themselves and are alive."""
        prefix = f"{self._application}/{kind}/"
        alive = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
        versions = {}
        for key in internal_kv._internal_kv_list(prefix.encode(), namespace=_NAMESPACE):
            name = key.decode().removeprefix(prefix)
            version = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
            if name not in alive:
                internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
            elif version is not None and name != self._actor_name:
                versions[name] = version.decode()
        return versions


def own_handover(text_version: str) -> Handover:
    """Of the replica that runs in this process."""
    replica_id = ray.serve.get_replica_context().replica_id
    return Handover(replica_id.deployment_id.app_name, replica_id.to_full_id_str(), text_version)
