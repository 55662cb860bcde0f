"""`Calls`: one attempt at a request is one streaming call, routed to a replica by Serve, as long as it is there."""

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator

import msgspec
import ray.serve.context
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from gptj_serve.errors import (
    GPTJServeError,
    InvalidRequestError,
    OverloadedError,
    PipelineError,
    RequestFailedError,
    WireError,
)
from gptj_serve.serving.attempt import (
    AskElsewhereError,
    Attempt,
    FullError,
    Leaves,
    ReplicaLeftError,
    ReplicaLostError,
    first_line,
)
from gptj_serve.serving.event_streams import EventStreams
from gptj_serve.serving.replicas import Replicas
from gptj_serve.serving.tracing import tracer
from gptj_serve.types import EngineRequest, Event, OtherVersion, Overload, Refusal, is_terminal
from gptj_serve.wire import WireDecoder

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 10.0
"""A replica whose last events do not come within this time after the call has ended counts as lost."""

BACKPRESSURE_RETRY_AFTER_S = 1.0

_REFUSALS = WireDecoder[Refusal | Overload | OtherVersion](Refusal | Overload | OtherVersion)


class Calls:
    """Those of one ingress."""

    def __init__(self, pipelines: DeploymentHandle, ingress_id: str, streams: EventStreams, replicas: Replicas) -> None:
        """`pipelines` streams what its methods yield; the events come over `streams`."""
        self._pipelines = pipelines
        self._ingress_id = ingress_id
        self._streams = streams
        self._replicas = replicas
        self._is_traced = tracer() is not None
        self._watchers: set[asyncio.Task[None]] = set()  # so that none is collected before its end

    async def events(
        self, attempt: Attempt, request: EngineRequest, *, may_leave: bool, take_by: float | None
    ) -> AsyncGenerator[Event]:
        """The request's events from one replica.

        Raises `NotTakenError` if none has taken it at `take_by`, by the loop's clock: while none runs, Serve's router
        would keep it for ever. Raises `AskElsewhereError` if one does not take it, `ReplicaLostError` if it doesn't
        stay.
        """
        # Calls made inside one HTTP request share its internal id, by which Serve's router tells waiting calls apart
        # (Ray 2.60): of several at once all but one would wait for ever. In a context of its own each has its own.
        context = contextvars.Context()
        if self._is_traced:  # the span that the call belongs to is in the request's context
            context = contextvars.copy_context()
            context.run(ray.serve.context._serve_request_context.set, None)
        where = {"avoid": attempt.avoid, "prefer": attempt.prefer}
        for_router = {name: value for name, value in where.items() if value}
        call = context.run(self._pipelines.run.remote, self._ingress_id, msgspec.msgpack.encode(request), **for_router)
        self._streams.add(attempt)  # from here on nothing is left behind
        watcher = asyncio.create_task(self._watch(call, attempt))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        loop = asyncio.get_running_loop()
        timer = None if take_by is None else loop.call_at(take_by, attempt.end_if_not_taken)
        try:
            while not attempt.has_ended.is_set():
                item = await attempt.inbox.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, Leaves):
                    if may_leave:
                        raise ReplicaLeftError("its pipeline has lost a stage")
                    continue
                if is_terminal(item):
                    attempt.has_ended.set()
                yield item
        finally:
            if timer is not None:
                timer.cancel()
            self._streams.remove(attempt)
            if not attempt.has_ended.is_set():  # else it ends by itself; Serve logs each call that is cancelled
                watcher.cancel()
                call.cancel()

    async def _watch(self, call: DeploymentResponseGenerator[str | bytes], attempt: Attempt) -> None:
        """Follow the call of one request to its end, and report an end that is not the request's own."""
        request_id, inbox, replica_id = attempt.request_id, attempt.inbox, None
        try:
            async for item in call:
                if isinstance(item, bytes):
                    inbox.put_nowait(self._error_of(_REFUSALS.decode(item)))
                    return
                replica_id = item
                self._streams.took(replica_id, attempt)
            await asyncio.wait_for(attempt.has_ended.wait(), END_TIMEOUT_S)
        except TimeoutError:
            inbox.put_nowait(ReplicaLostError("the request ended there, but its events did not come"))
        except BackPressureError:
            message = "every pipeline has as many requests waiting as it accepts"
            inbox.put_nowait(
                OverloadedError(message, max(BACKPRESSURE_RETRY_AFTER_S, self._replicas.shortest_wait_s()))
            )
        except RayTaskError as error:
            inbox.put_nowait(_what_went_wrong(error.cause))
        except (RayError, RayServeException) as error:
            inbox.put_nowait(ReplicaLostError(first_line(error), is_suspicious=replica_id is not None))
            if isinstance(error, ActorDiedError) and replica_id is not None:
                self._streams.close(replica_id)  # it may still wait to be routed there
        except Exception as error:
            logger.exception("request %s: its call failed", request_id, extra={"request_id": request_id})
            inbox.put_nowait(RequestFailedError(f"the call to the pipeline failed: {error!r}"))

    def _error_of(self, refusal: Refusal | Overload | OtherVersion) -> Exception:
        if isinstance(refusal, OtherVersion):
            self._streams.on_version(refusal.replica_id, refusal.version)
            return AskElsewhereError(refusal)
        if isinstance(refusal, Overload):
            self._replicas.refused(refusal.replica_id, refusal.queue_wait_s)
            return FullError(refusal)
        return InvalidRequestError(refusal.field, refusal.value, refusal.reason)


def _what_went_wrong(cause: BaseException) -> Exception:
    """What a replica's exception means for the request: it may go elsewhere, was refused, or failed."""
    if isinstance(cause, PipelineError):
        return ReplicaLostError(str(cause))
    if isinstance(cause, WireError):
        return RequestFailedError(f"the pipeline could not read the request: {cause}")
    if isinstance(cause, GPTJServeError):
        return cause
    return RequestFailedError(f"the pipeline failed: {cause!r}")
