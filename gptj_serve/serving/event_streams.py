"""`EventStreams`: what one ingress hears from the replicas that have its requests, each over one stream.

The events of all its requests at a replica come over the same call, and with them whether that replica is ready, how
long its queue is and which version of the model it serves. Requests are taken along from a replica that leaves.
"""

import asyncio
import contextvars
import logging
from collections import defaultdict

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from gptj_serve.routing.choice import PipelineChoice
from gptj_serve.serving.answers import Answers
from gptj_serve.serving.attempt import (
    AskElsewhereError,
    Attempt,
    Leaves,
    MovedError,
    ReplicaLeftError,
    ReplicaLostError,
    first_line,
)
from gptj_serve.serving.replicas import SAME_WAIT_S, Replicas
from gptj_serve.types import Event, LoadEvent, ModelVersion
from gptj_serve.wire import WireDecoder

logger = logging.getLogger(__name__)

OPENING_TIMEOUT_S = 10.0
"""A replica whose event stream does not open within this time counts as lost."""

VERSION_RETRY_S = 1.0
"""After an event stream that ended before it brought the replica's version."""


class EventStreams:
    """Used in one event loop, but for what `Replicas` tells."""

    def __init__(
        self,
        pipelines: DeploymentHandle,
        ingress_id: str,
        answers: Answers,
        replicas: Replicas,
        choice: PipelineChoice,
    ) -> None:
        """`pipelines` streams what its methods yield."""
        self._pipelines = pipelines
        self._ingress_id = ingress_id
        self._answers = answers
        self._replicas = replicas
        self._choice = choice
        self._loop: asyncio.AbstractEventLoop | None = None
        self._attempts: dict[str, Attempt] = {}  # by their request ids
        self._requests_at: defaultdict[str, set[str]] = defaultdict(set)  # these ids by replica id
        self._streams: dict[str, asyncio.Task[None]] = {}  # by replica id
        self._without_queue: set[str] = set()  # ids of replicas that have told so, and taken nothing since
        replicas.subscribe(self._on_left)
        replicas.subscribe_arrivals(self._on_arrived)

    def start(self) -> None:
        """Before the first request; again is harmless."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._ask_versions(self._replicas.running)

    def add(self, attempt: Attempt) -> None:
        """From now on its events come into its inbox."""
        self._attempts[attempt.request_id] = attempt

    def took(self, replica_id: str, attempt: Attempt) -> None:
        attempt.is_taken = True
        if attempt.request_id in self._attempts:  # else its last event has come before this
            self._requests_at[replica_id].add(attempt.request_id)
            self._choice.on_taken(attempt.request_id, replica_id)
            self._ensure(replica_id)
        attempt.is_moving = False
        self._without_queue.discard(replica_id)

    def remove(self, attempt: Attempt) -> None:
        del self._attempts[attempt.request_id]
        for replica_id, requests in self._requests_at.items():
            if attempt.request_id in requests:
                requests.discard(attempt.request_id)
                if not requests and replica_id not in self._replicas.running:
                    self.close(replica_id)

    def close(self, replica_id: str) -> None:
        if replica_id in self._streams:
            self._streams[replica_id].cancel()

    def on_version(self, replica_id: str, version: ModelVersion) -> None:
        is_here = replica_id in self._replicas.running or replica_id in self._streams
        if is_here and self._replicas.version(replica_id) is None:
            self._replicas.set_version(replica_id, version)
            self._leave(frozenset(self._requests_at) - self._replicas.running)

    def _ensure(self, replica_id: str) -> None:
        if replica_id not in self._streams:
            task = asyncio.get_running_loop().create_task(
                self._read(replica_id),
                context=contextvars.Context(),  # outside any request: Serve cancels what is born inside one
            )
            self._streams[replica_id] = task

    def _on_left(self, replica_ids: frozenset[str]) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._leave, replica_ids)

    def _leave(self, replica_ids: frozenset[str]) -> None:
        """Take requests along from replicas that are stopping (or dead), if there is anywhere to go.

        Else they go on there: Serve gives a stopping replica some time.
        """
        for replica_id in replica_ids:
            attempts = self._at(replica_id)
            leaving = [attempt for attempt in attempts if self._answers.others(attempt.answer, replica_id)]
            for attempt in leaving:
                attempt.inbox.put_nowait(ReplicaLeftError("its pipeline is being stopped", is_suspicious=False))
            if len(leaving) == len(attempts):
                self.close(replica_id)
            if replica_id not in self._streams:  # else it is forgotten when that ends
                self._replicas.forget(replica_id)
        running = self._replicas.running
        on_their_way = [attempt for attempt in self._attempts.values() if not attempt.is_taken]
        for attempt in on_their_way:
            if running and running <= attempt.avoid | self._answers.unfit(attempt.answer):
                attempt.inbox.put_nowait(AskElsewhereError("no pipeline is left for it"))

    def _on_arrived(self, replica_ids: frozenset[str]) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._ask_versions, replica_ids)

    def _ask_versions(self, replica_ids: frozenset[str]) -> None:
        """By an event stream: it begins with the version."""
        if not self._answers.text_version:
            return
        for replica_id in replica_ids & self._replicas.running:
            if self._replicas.version(replica_id) is None:
                self._ensure(replica_id)

    def _on_load(self, replica_id: str, load: LoadEvent) -> None:
        if load.version is not None:
            self.on_version(replica_id, load.version)
        if load.num_kv_blocks:
            self._choice.set_pool(replica_id, load.num_kv_blocks)
        self._replicas.set_load(
            replica_id, is_ready=load.is_ready, queue_wait_s=load.queue_wait_s, num_others=load.num_others
        )
        self._without_queue.discard(replica_id)
        if load.is_ready:
            self._share(replica_id, load)
            return
        self._choice.forget(replica_id)
        for attempt in self._at(replica_id):
            if self._answers.others(attempt.answer, replica_id):
                attempt.inbox.put_nowait(Leaves())

    def _share(self, replica_id: str, load: LoadEvent) -> None:
        """Of what waits in a long queue, replicas at which nothing waits get their part: the last that came.

        It loses nothing by it; a pipeline that was started for a burst would else get none of that. Only what its
        pipeline has just told to be waiting goes, and nothing before all that went is taken, and counted where it is.
        """
        is_moving = any(attempt.is_moving for attempt in self._attempts.values())
        if load.num_waiting == 0 and load.queue_wait_s == 0 and not is_moving:
            self._without_queue.add(replica_id)
        if load.queue_wait_s <= SAME_WAIT_S or not load.waiting:
            return
        for other in self._replicas.others(replica_id):
            self._ensure(other)  # it may have no queue, and tells so
        free = self._without_queue & self._replicas.others(replica_id)
        if is_moving or not free:
            return
        there = [self._attempts[request_id] for request_id in load.waiting if request_id in self._attempts]
        waiting = [
            attempt
            for attempt in there
            if attempt.is_taken and not attempt.has_begun and free & self._answers.others(attempt.answer, replica_id)
        ]
        queues = [id_ for id_ in self._replicas.running if self._replicas.wait_s(id_) > SAME_WAIT_S]
        num_to_stay = -(-len(waiting) * len(queues) // (len(queues) + len(free)))
        for attempt in waiting[num_to_stay:]:
            attempt.is_moving = True
            attempt.inbox.put_nowait(MovedError("nothing waits at another pipeline"))

    def _at(self, replica_id: str) -> list[Attempt]:
        request_ids = self._requests_at.get(replica_id, ())
        return [self._attempts[request_id] for request_id in request_ids if request_id in self._attempts]

    async def _read(self, replica_id: str) -> None:
        """Deliver a replica's events until its stream ends; it ends by itself when no request is left there."""
        decoder = WireDecoder[list[Event | LoadEvent]](list[Event | LoadEvent])
        stream = self._pipelines.events.remote(self._ingress_id, replica_id=replica_id)
        try:
            # A call that names a replica which is gone would wait in the router for ever, and block it for others.
            batch = await asyncio.wait_for(anext(stream), OPENING_TIMEOUT_S)
            while batch is not None:
                for event in decoder.decode(batch):
                    if isinstance(event, LoadEvent):
                        self._on_load(replica_id, event)
                    elif (attempt := self._attempts.get(event.request_id)) is not None:
                        attempt.is_taken = attempt.has_begun = True
                        self._choice.on_event(event.request_id, replica_id)
                        is_fit = self._answers.takes(attempt.answer, replica_id)
                        attempt.inbox.put_nowait(event if is_fit else AskElsewhereError("it is of another version"))
                batch = await anext(stream, None)
        except (Exception, asyncio.CancelledError) as error:
            if not isinstance(error, RayError | RayServeException | TimeoutError | asyncio.CancelledError):
                logger.exception("the event stream of pipeline %s failed", replica_id)
            self._choice.forget(replica_id)  # it may be gone, and Serve not know yet
            for attempt in self._at(replica_id):
                attempt.inbox.put_nowait(ReplicaLostError(first_line(error)))
            self._requests_at.pop(replica_id, None)
        finally:
            stream.cancel()
            self._without_queue.discard(replica_id)
            self._replicas.forget(replica_id)
            del self._streams[replica_id]
        if self._requests_at.get(replica_id):
            self._ensure(replica_id)  # a request came while the stream was ending
        else:
            self._requests_at.pop(replica_id, None)
            asyncio.get_running_loop().call_later(VERSION_RETRY_S, self._ask_versions, frozenset({replica_id}))
