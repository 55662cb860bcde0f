"""`ServeEngineClient`: an ingress's way to the engines, over the pipelines' Serve handle.

A request is one streaming call, routed to a replica by Serve. Its tokens come through that replica's event stream,
which all requests of this ingress share, so that a step's tokens cross the handle as one item. When a replica is
lost, the request goes to another with the tokens it already has (replay): noise is a function of (seed, position),
so the caller sees a pause and nothing else.
"""

import asyncio
import contextvars
import itertools
import logging
import secrets
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
import ray.serve.context
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentBroadcastResponse, DeploymentHandle, DeploymentResponseGenerator

from gptj_serve.errors import (
    GPTJServeError,
    InvalidRequestError,
    OverloadedError,
    PipelineError,
    RequestFailedError,
    WireError,
)
from gptj_serve.serving.answers import Answer, Answers
from gptj_serve.serving.replicas import REPLICAS, Replicas
from gptj_serve.serving.tracing import tracer
from gptj_serve.types import (
    EngineRequest,
    Event,
    FailureEvent,
    LoadEvent,
    ModelVersion,
    OtherVersion,
    Overload,
    PromptEvent,
    Refusal,
    SamplingParams,
    TokenEvent,
    is_terminal,
)
from gptj_serve.wire import WireDecoder

logger = logging.getLogger(__name__)

MAX_REPLICA_LOSSES = 5
"""A request that so many replicas in a row died with, without a token in between, is taken for the cause."""

MAX_GIVEN_UP = 2
"""And so is one that so many pipelines gave up, since they were lost again and again while they computed it."""

REPLAY_DELAY_S = 0.1
MAX_REPLAY_DELAY_S = 2.0
"""Before a request is sent again; doubled with each loss in a row. One that leaves for a replica that is ready does so
at once, the first time."""

EVENTS_TIMEOUT_S = 10.0
"""A replica whose event stream does not open, or whose last events do not come, within this time counts as lost."""

VERSION_RETRY_S = 1.0
"""After an event stream that ended before it brought the replica's version."""

MIN_TIME_S = 1e-3
"""Of max_time_s that a replayed request keeps at least: it must be above 0, and one token comes in any case."""

BACKPRESSURE_RETRY_AFTER_S = 1.0

STATUS_TIMEOUT_S = 2.0


_REFUSALS = WireDecoder[Refusal | Overload | OtherVersion](Refusal | Overload | OtherVersion)


class _ReplicaLostError(Exception):
    """The replica that served a request, or was to, is gone or can't be reached."""

    def __init__(self, message: str, *, is_suspicious: bool = True) -> None:
        """`is_suspicious`: the request was there and may be the cause."""
        super().__init__(message)
        self.is_suspicious = is_suspicious


class _ReplicaLeftError(_ReplicaLostError):
    """It is not gone, but stops or has lost a stage, and another one is ready."""


class _AskElsewhereError(Exception):
    """By what is known now, not this replica but another one may take the request, if any."""


class _FullError(_AskElsewhereError):
    """The replica has no room for it."""

    def __init__(self, refusal: Overload) -> None:
        super().__init__(refusal)
        self.replica_id = refusal.replica_id
        self.overload = OverloadedError(refusal.message, refusal.retry_after_s)


class _NotTakenError(Exception):
    """No replica took the request in time."""


class _Leaves:
    """In an inbox: the pipeline is bringing a stage back, and others could go on at once."""


@dataclass(slots=True)
class _Attempt:
    """A request on its way to a replica, none of those to `avoid`, or there."""

    request_id: str  # of its own
    answer: Answer
    avoid: frozenset[str]
    inbox: asyncio.Queue[Event | Exception | _Leaves] = field(default_factory=asyncio.Queue)
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)
    is_taken: bool = False  # by a replica

    def end_if_not_taken(self) -> None:
        if not self.is_taken:
            self.inbox.put_nowait(_NotTakenError())


class ServeEngineClient:
    """Implements the api's `EngineClient`."""

    def __init__(
        self,
        pipelines: DeploymentHandle,
        on_replay: Callable[[], None] = lambda: None,
        replicas: Replicas = REPLICAS,
        *,
        replay_timeout_s: float,
        max_queue_wait_s: float | None = None,
        text_version: str = "",
    ) -> None:
        """`on_replay` is called when a request is sent again. One that gets no further for `replay_timeout_s` after
        the loss of its replica is given up. `max_queue_wait_s` is the pipelines' own limit, `text_version` the
        ingress's own (`ModelVersion`).
        """
        self._max_queue_wait_s = max_queue_wait_s
        self._on_replay = on_replay
        self._replicas = replicas
        self._replay_timeout_s = replay_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        replicas.subscribe(self._on_left)
        self._answers = Answers(text_version, replicas)
        replicas.subscribe_arrivals(self._on_arrived)
        self._is_traced = tracer() is not None
        self._pipeline_ids: set[str] = set()  # of those that answered the last question for their status
        self._pipelines = pipelines.options(stream=True)
        self._ingress_id = secrets.token_hex(8)
        self._attempts: dict[str, _Attempt] = {}  # by their request ids
        self._requests_at: defaultdict[str, set[str]] = defaultdict(set)  # these ids by replica id
        self._event_streams: dict[str, asyncio.Task[None]] = {}  # by replica id
        self._watchers: set[asyncio.Task[None]] = set()  # so that none is collected before its end

    async def submit(self, request: EngineRequest) -> AsyncGenerator[Event]:
        self._refuse_if_full(request)
        with self._answers.sequence(request.request_id) as answer:
            async with aclosing(self._submit(request, answer)) as events:
                async for event in events:
                    yield event

    async def _submit(self, request: EngineRequest, answer: Answer) -> AsyncGenerator[Event]:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._ask_versions(self._replicas.running)
        tokens = list(request.output_token_ids)
        has_prompt_scores = False
        clock = asyncio.get_running_loop().time
        began_at = clock()
        stuck_since: float | None = None  # the first loss since the last token
        delay_s = 0.0  # after the next loss, at least
        num_losses = num_given_up = 0
        is_resumed = request.is_resumed
        refusals: dict[str, OverloadedError] = {}  # by replica id, since the last loss
        for number in itertools.count():
            self._answers.check_not_stranded(answer)
            avoid = self._answers.unfit(answer) | refusals.keys()
            if refusals and not self._replicas.running - self._replicas.recovering - avoid:
                raise min(refusals.values(), key=lambda refusal: refusal.retry_after_s)
            elapsed_s = clock() - began_at
            # Each attempt has an id of its own, so that nothing late from a lost replica is taken for this one's.
            attempt_request = msgspec.structs.replace(
                request,
                request_id=f"{request.request_id}-{number}",
                output_token_ids=tokens.copy(),
                is_resumed=is_resumed,
                time_left_s=None if request.time_left_s is None else max(request.time_left_s - elapsed_s, 0.0),
                sampling=_rest_of(request.sampling, elapsed_s, has_prompt_scores),
                text_version=self._answers.text_version,
                numbers_version=answer.numbers_version,
            )
            attempt = _Attempt(attempt_request.request_id, answer, avoid)
            try:
                # What was lost once with a request in it may be lost by it: there the scheduler finds out, elsewhere
                # it would start anew.
                take_by = None if stuck_since is None else stuck_since + self._replay_timeout_s
                stream = self._events_of(attempt, attempt_request, may_leave=num_losses == 0, take_by=take_by)
                async with aclosing(stream) as events:
                    async for event in events:
                        if isinstance(event, FailureEvent) and event.is_pipeline_at_fault:
                            num_given_up += 1
                            if num_given_up < MAX_GIVEN_UP:
                                raise _ReplicaLostError(event.message, is_suspicious=False)
                        if isinstance(event, TokenEvent):
                            assert event.index == len(tokens), "a token was lost or repeated"
                            tokens.append(event.token_id)
                            stuck_since, delay_s, num_losses = None, 0.0, 0
                        has_prompt_scores |= isinstance(event, PromptEvent)
                        yield event
                        if is_terminal(event):
                            return
            except _FullError as full:
                self._refuse_if_full(attempt_request)
                refusals[full.replica_id] = full.overload
            except _AskElsewhereError:
                pass
            except _NotTakenError:
                break
            except _ReplicaLostError as lost:
                refusals.clear()
                stuck_since = clock() if stuck_since is None else stuck_since
                num_losses += lost.is_suspicious
                if num_losses >= MAX_REPLICA_LOSSES:
                    message = f"{num_losses} pipelines in a row were lost while they had this request"
                    yield FailureEvent(request.request_id, message)
                    return
                if clock() - stuck_since > self._replay_timeout_s:
                    break
                logger.warning(
                    "request %s is sent again after %d tokens: %s", request.request_id, len(tokens), lost,
                    extra={"request_id": request.request_id},
                )  # fmt: skip
                self._on_replay()
                if not isinstance(lost, _ReplicaLeftError):
                    delay_s = max(delay_s, REPLAY_DELAY_S)
                await asyncio.sleep(delay_s)
                delay_s = min(max(2 * delay_s, REPLAY_DELAY_S), MAX_REPLAY_DELAY_S)
            is_resumed |= attempt.is_taken
        message = f"no pipeline took the request further for {self._replay_timeout_s:g} s"
        yield FailureEvent(request.request_id, message)

    def queue_wait_s(self) -> float:
        return self._replicas.shortest_wait_s()

    async def status(self) -> tuple[list[dict[str, Any]], list[str]]:
        try:
            answers = await _all_answers(self._pipelines.broadcast("status"), STATUS_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            return [], [f"no pipeline can be asked: {_first_line(error)}"]
        pipelines = [answer for answer in answers if isinstance(answer, dict)]
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        answered = {pipeline["replica_id"] for pipeline in pipelines}
        silent = sorted(self._pipeline_ids - answered)
        names = silent if len(silent) == len(errors) else ["?"] * len(errors)  # an error doesn't say whose it is
        self._pipeline_ids = answered.union(silent) if errors else answered
        problems = [f"pipeline {n} does not answer: {_first_line(e)}" for n, e in zip(names, errors, strict=True)]
        return sorted(pipelines, key=lambda pipeline: str(pipeline["replica_id"])), problems

    async def _events_of(
        self, attempt: _Attempt, request: EngineRequest, *, may_leave: bool, take_by: float | None
    ) -> AsyncGenerator[Event]:
        """The request's events from one replica.

        Raises `_NotTakenError` if none has taken it at `take_by`, by the loop's clock: while none runs, Serve's router
        would keep it for ever. Raises `_AskElsewhereError` if one does not take it, `_ReplicaLostError` if it doesn't
        stay.
        """
        # Calls made inside one HTTP request share its internal id, by which Serve's router tells waiting calls apart
        # (Ray 2.60): of several at once all but one would wait for ever. In a context of its own each has its own.
        context = contextvars.Context()
        if self._is_traced:  # the span that the call belongs to is in the request's context
            context = contextvars.copy_context()
            context.run(ray.serve.context._serve_request_context.set, None)
        avoid = {"avoid": attempt.avoid} if attempt.avoid else {}
        call = context.run(self._pipelines.run.remote, self._ingress_id, msgspec.msgpack.encode(request), **avoid)
        self._attempts[attempt.request_id] = attempt  # from here on nothing is left behind
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
                if isinstance(item, _Leaves):
                    if may_leave:
                        raise _ReplicaLeftError("its pipeline has lost a stage")
                    continue
                if is_terminal(item):
                    attempt.has_ended.set()
                yield item
        finally:
            if timer is not None:
                timer.cancel()
            del self._attempts[attempt.request_id]
            for replica_id, requests in self._requests_at.items():
                if attempt.request_id in requests:
                    requests.discard(attempt.request_id)
                    if not requests and replica_id not in self._replicas.running:
                        self._close_event_stream(replica_id)
            if not attempt.has_ended.is_set():  # else it ends by itself; Serve logs each call that is cancelled
                watcher.cancel()
                call.cancel()

    async def _watch(self, call: DeploymentResponseGenerator[str | bytes], attempt: _Attempt) -> None:
        """Follow the call of one request to its end, and report an end that is not the request's own."""
        request_id, inbox, replica_id = attempt.request_id, attempt.inbox, None
        try:
            async for item in call:
                if isinstance(item, bytes):
                    inbox.put_nowait(self._error_of(_REFUSALS.decode(item)))
                    return
                replica_id = item
                attempt.is_taken = True
                if request_id in self._attempts:  # else its last event has come before this
                    self._requests_at[replica_id].add(request_id)
                    self._ensure_event_stream(replica_id)
            await asyncio.wait_for(attempt.has_ended.wait(), EVENTS_TIMEOUT_S)
        except TimeoutError:
            inbox.put_nowait(_ReplicaLostError("the request ended there, but its events did not come"))
        except BackPressureError:
            message = "every pipeline has as many requests waiting as it accepts"
            inbox.put_nowait(OverloadedError(message, max(BACKPRESSURE_RETRY_AFTER_S, self.queue_wait_s())))
        except RayTaskError as error:
            inbox.put_nowait(_what_went_wrong(error.cause))
        except (RayError, RayServeException) as error:
            inbox.put_nowait(_ReplicaLostError(_first_line(error), is_suspicious=replica_id is not None))
            if isinstance(error, ActorDiedError) and replica_id is not None:
                self._close_event_stream(replica_id)  # it may still wait to be routed there
        except Exception as error:
            logger.exception("request %s: its call failed", request_id, extra={"request_id": request_id})
            inbox.put_nowait(RequestFailedError(f"the call to the pipeline failed: {error!r}"))

    def _error_of(self, refusal: Refusal | Overload | OtherVersion) -> Exception:
        if isinstance(refusal, OtherVersion):
            self._on_version(refusal.replica_id, refusal.version)
            return _AskElsewhereError(refusal)
        if isinstance(refusal, Overload):
            self._replicas.refused(refusal.replica_id, refusal.queue_wait_s)
            return _FullError(refusal)
        return InvalidRequestError(refusal.field, refusal.value, refusal.reason)

    def _refuse_if_full(self, request: EngineRequest) -> None:
        """As a pipeline would, without asking one, if all have told that their queues are too long.

        Those that go before others are asked about all the same: for them only a pipeline knows.
        """
        if request.priority < 0 or request.is_resumed:
            return
        wait_s = self._replicas.shortest_wait_s()
        for limit_s, words in (
            (self._max_queue_wait_s, "the service's limit of {:g} s"),
            (request.time_left_s, "the time of {:.3g} s that it has"),
        ):
            if limit_s is not None and wait_s > limit_s:
                message = f"the request would wait for about {wait_s:.0f} s, longer than {words.format(limit_s)}"
                raise OverloadedError(message, wait_s - limit_s)

    def _ensure_event_stream(self, replica_id: str) -> None:
        if replica_id not in self._event_streams:
            task = asyncio.get_running_loop().create_task(
                self._read_events(replica_id),
                context=contextvars.Context(),  # outside any request: Serve cancels what is born inside one
            )
            self._event_streams[replica_id] = task

    def _close_event_stream(self, replica_id: str) -> None:
        if replica_id in self._event_streams:
            self._event_streams[replica_id].cancel()

    def _on_left(self, replica_ids: frozenset[str]) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._leave, replica_ids)

    def _leave(self, replica_ids: frozenset[str]) -> None:
        """Take requests along from replicas that are stopping (or dead), if there is anywhere to go.

        Else they go on there: Serve gives a stopping replica some time.
        """
        for replica_id in replica_ids:
            attempts = self._attempts_at(replica_id)
            leaving = [attempt for attempt in attempts if self._answers.others(attempt.answer, replica_id)]
            for attempt in leaving:
                attempt.inbox.put_nowait(_ReplicaLeftError("its pipeline is being stopped", is_suspicious=False))
            if len(leaving) == len(attempts):
                self._close_event_stream(replica_id)
            if replica_id not in self._event_streams:  # else it is forgotten when that ends
                self._replicas.forget(replica_id)
        running = self._replicas.running
        on_their_way = [attempt for attempt in self._attempts.values() if not attempt.is_taken]
        for attempt in on_their_way:
            if running and running <= attempt.avoid | self._answers.unfit(attempt.answer):
                attempt.inbox.put_nowait(_AskElsewhereError("no pipeline is left for it"))

    def _on_arrived(self, replica_ids: frozenset[str]) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._ask_versions, replica_ids)

    def _ask_versions(self, replica_ids: frozenset[str]) -> None:
        """By an event stream: it begins with the version."""
        if not self._answers.text_version:
            return
        for replica_id in replica_ids & self._replicas.running:
            if self._replicas.version(replica_id) is None:
                self._ensure_event_stream(replica_id)

    def _on_version(self, replica_id: str, version: ModelVersion) -> None:
        is_here = replica_id in self._replicas.running or replica_id in self._event_streams
        if is_here and self._replicas.version(replica_id) is None:
            self._replicas.set_version(replica_id, version)
            self._leave(frozenset(self._requests_at) - self._replicas.running)

    def _on_load(self, replica_id: str, load: LoadEvent) -> None:
        if load.version is not None:
            self._on_version(replica_id, load.version)
        self._replicas.set_load(replica_id, is_ready=load.is_ready, queue_wait_s=load.queue_wait_s)
        if load.is_ready:
            return
        for attempt in self._attempts_at(replica_id):
            if self._answers.others(attempt.answer, replica_id):
                attempt.inbox.put_nowait(_Leaves())

    def _attempts_at(self, replica_id: str) -> list[_Attempt]:
        request_ids = self._requests_at.get(replica_id, ())
        return [self._attempts[request_id] for request_id in request_ids if request_id in self._attempts]

    async def _read_events(self, replica_id: str) -> None:
        """Deliver a replica's events until its stream ends; it ends by itself when no request is left there."""
        decoder = WireDecoder[list[Event | LoadEvent]](list[Event | LoadEvent])
        stream = self._pipelines.events.remote(self._ingress_id, replica_id=replica_id)
        try:
            # A call that names a replica which is gone would wait in the router for ever, and block it for others.
            batch = await asyncio.wait_for(anext(stream), EVENTS_TIMEOUT_S)
            while batch is not None:
                for event in decoder.decode(batch):
                    if isinstance(event, LoadEvent):
                        self._on_load(replica_id, event)
                    elif (attempt := self._attempts.get(event.request_id)) is not None:
                        attempt.is_taken = True
                        is_fit = self._answers.takes(attempt.answer, replica_id)
                        attempt.inbox.put_nowait(event if is_fit else _AskElsewhereError("it is of another version"))
                batch = await anext(stream, None)
        except (Exception, asyncio.CancelledError) as error:
            if not isinstance(error, RayError | RayServeException | TimeoutError | asyncio.CancelledError):
                logger.exception("the event stream of pipeline %s failed", replica_id)
            for attempt in self._attempts_at(replica_id):
                attempt.inbox.put_nowait(_ReplicaLostError(_first_line(error)))
            self._requests_at.pop(replica_id, None)
        finally:
            stream.cancel()
            self._replicas.forget(replica_id)
            del self._event_streams[replica_id]
        if self._requests_at.get(replica_id):
            self._ensure_event_stream(replica_id)  # a request came while the stream was ending
        else:
            self._requests_at.pop(replica_id, None)
            asyncio.get_running_loop().call_later(VERSION_RETRY_S, self._ask_versions, frozenset({replica_id}))


async def _all_answers(call: DeploymentBroadcastResponse, timeout_s: float) -> list[Any]:
    """What each replica answered, or the exception that came instead.

    Ray 2.60's own `results_async` is all or nothing: one replica that hangs would hide the others.
    """
    replicas = await asyncio.wait_for(call._fetch_replica_results_async(), timeout_s)
    waits = [asyncio.wait_for(replica.get_async(), timeout_s) for replica in replicas]
    return await asyncio.gather(*waits, return_exceptions=True)


def _what_went_wrong(cause: BaseException) -> Exception:
    """What a replica's exception means for the request: it may go elsewhere, was refused, or failed."""
    if isinstance(cause, PipelineError):
        return _ReplicaLostError(str(cause))
    if isinstance(cause, WireError):
        return RequestFailedError(f"the pipeline could not read the request: {cause}")
    if isinstance(cause, GPTJServeError):
        return cause
    return RequestFailedError(f"the pipeline failed: {cause!r}")


def _rest_of(sampling: SamplingParams | None, elapsed_s: float, has_prompt_scores: bool) -> SamplingParams | None:
    """What another attempt still owes: the prompt's scores if they have not come, and the time that is left."""
    if sampling is None:
        return None
    max_time_s = sampling.max_time_s
    return msgspec.structs.replace(
        sampling,
        prompt_logprobs=sampling.prompt_logprobs and not has_prompt_scores,
        max_time_s=None if max_time_s is None else max(max_time_s - elapsed_s, MIN_TIME_S),
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
