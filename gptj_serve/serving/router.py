"""`PipelineRouter`: the less loaded of two random replicas, except where a call names its replica."""

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class PipelineRouter(RequestRouter):  # type: ignore[misc]  # ray is untyped
    """A call with the keyword `replica_id` goes to that replica, and waits for as long as it is not there."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve retries in a loop that never yields
            replica_id = pending_request.kwargs.get("replica_id")
            if replica_id is not None:
                return [[replica for replica in candidate_replicas if replica.replica_id.unique_id == replica_id]]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
