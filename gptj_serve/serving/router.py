"""`PipelineRouter`: the replica that a call names or prefers, else the less loaded of two random ones of the best."""

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from gptj_serve.serving import replicas  # the module: Serve pickles this class, which must bring no Replicas along


class PipelineRouter(RequestRouter):  # type: ignore[misc]  # ray is untyped
    """A call with the keyword `replica_id` goes to that replica, and waits for as long as it is not there.

    Others go to a replica that is bringing a lost stage back only if there is no other, to one where they would wait
    only if they would elsewhere too, and never to one of those in the keyword `avoid`. If after all that the one in the
    keyword `prefer` is left, and takes as many requests at a time, they go there.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        preferred = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve retries in a loop that never yields
            replica_id = pending_request.kwargs.get("replica_id")
            if replica_id is not None:
                return [[replica for replica in candidate_replicas if replica.replica_id.unique_id == replica_id]]
            preferred = pending_request.kwargs.get("prefer")
            avoid = pending_request.kwargs.get("avoid", ())
            candidate_replicas = [r for r in candidate_replicas if r.replica_id.unique_id not in avoid]
        best = replicas.REPLICAS.best(replica.replica_id.unique_id for replica in candidate_replicas)
        choices = [replica for replica in candidate_replicas if replica.replica_id.unique_id in best]
        first = [replica for replica in choices if replica.replica_id.unique_id == preferred]
        two = random.sample(choices, min(2, len(choices)))
        return [first, two] if first else [two]

    def update_replicas(self, running_replicas: list[RunningReplica]) -> None:
        super().update_replicas(running_replicas)
        replicas.REPLICAS.set_running(replica.replica_id.unique_id for replica in running_replicas)
