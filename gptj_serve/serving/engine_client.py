"""`ServeEngineClient`: an ingress's way to the engines, over the pipelines' Serve handle.

A request is one streaming call, routed to a replica by Serve. Its tokens come through that replica's event stream,
which all requests of this ingress share, so that a step's tokens cross the handle as one item. When a replica is
lost, the request goes to another with the tokens it already has (replay): noise is a function of (seed, position),
so the caller sees a pause and nothing else.
"""

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentBroadcastResponse, DeploymentHandle

from gptj_serve.api.status import PipelineChanges
from gptj_serve.errors import OverloadedError
from gptj_serve.queue_wait import check_wait
from gptj_serve.routing.choice import PipelineChoice, RoutedBy
from gptj_serve.serving.answers import Answer, Answers
from gptj_serve.serving.attempt import (
    AskElsewhereError,
    Attempt,
    FullError,
    MovedError,
    NotTakenError,
    ReplicaLeftError,
    ReplicaLostError,
    first_line,
)
from gptj_serve.serving.calls import Calls
from gptj_serve.serving.event_streams import EventStreams
from gptj_serve.serving.pipeline_counts import PipelineCounts
from gptj_serve.serving.replicas import REPLICAS, Replicas
from gptj_serve.types import EngineRequest, Event, FailureEvent, PromptEvent, SamplingParams, TokenEvent, is_terminal

logger = logging.getLogger(__name__)

MAX_REPLICA_LOSSES = 5
"""A request that so many replicas in a row died with, without a token in between, is taken for the cause."""

MAX_GIVEN_UP = 2
"""And so is one that so many pipelines gave up, since they were lost again and again while they computed it."""

REPLAY_DELAY_S = 0.1
MAX_REPLAY_DELAY_S = 2.0
"""Before a request is sent again; doubled with each loss in a row. One that leaves for a replica that is ready does so
at once, the first time."""

MIN_TIME_S = 1e-3
"""Of max_time_s that a replayed request keeps at least: it must be above 0, and one token comes in any case."""

STATUS_TIMEOUT_S = 2.0


class ServeEngineClient:
    """Implements the api's `EngineClient`."""

    def __init__(
        self,
        pipelines: DeploymentHandle,
        on_replay: Callable[[], None] = lambda: None,
        replicas: Replicas = REPLICAS,
        on_route: Callable[[RoutedBy], None] = lambda _: None,
        *,
        choice: PipelineChoice,
        replay_timeout_s: float,
        max_queue_wait_s: float | None = None,
        text_version: str = "",
        counts: PipelineCounts | None = None,
        may_have_none: bool = False,
    ) -> None:
        """`counts` are asked for what is started and stopped; `may_have_none`: that no pipeline runs is no problem.

        `on_replay` is called when a request is sent again, `on_route` each time that it is sent. One that gets no
        further for `replay_timeout_s` after the loss of its replica is given up. `max_queue_wait_s` is the pipelines'
        own limit, `text_version` the ingress's own (`ModelVersion`).
        """
        self._counts = counts
        self._may_have_none = may_have_none
        self._max_queue_wait_s = max_queue_wait_s
        self._on_replay = on_replay
        self._on_route = on_route
        self._choice = choice
        self._replicas = replicas
        self._replay_timeout_s = replay_timeout_s
        self._answers = Answers(text_version, replicas)
        self._pipeline_ids: set[str] = set()  # of those that answered the last question for their status
        self._pipelines = pipelines.options(stream=True)
        ingress_id = secrets.token_hex(8)
        self._streams = EventStreams(self._pipelines, ingress_id, self._answers, replicas, choice)
        self._calls = Calls(self._pipelines, ingress_id, self._streams, replicas)

    async def submit(self, request: EngineRequest) -> AsyncGenerator[Event]:
        self._refuse_if_full(request)
        with self._answers.sequence(request.request_id) as answer:
            async with aclosing(self._submit(request, answer)) as events:
                async for event in events:
                    yield event

    async def _submit(self, request: EngineRequest, answer: Answer) -> AsyncGenerator[Event]:
        self._streams.start()
        tokens = list(request.output_token_ids)
        has_prompt_scores = False
        clock = asyncio.get_running_loop().time
        began_at = clock()
        stuck_since: float | None = None  # the first loss since the last token
        delay_s = 0.0  # after the next loss, at least
        num_losses = num_given_up = 0
        is_admitted, is_moving = request.is_admitted, False
        refusals: dict[str, OverloadedError] = {}  # by replica id, since the last loss
        for number in itertools.count():
            await self._answers.wait_for_one_that_fits(answer)
            avoid = self._answers.unfit(answer) | refusals.keys()
            if refusals and not self._replicas.running - self._replicas.recovering - avoid:
                raise min(refusals.values(), key=lambda refusal: refusal.retry_after_s)
            elapsed_s = clock() - began_at
            # Each attempt has an id of its own, so that nothing late from a lost replica is taken for this one's.
            attempt_request = msgspec.structs.replace(
                request,
                request_id=f"{request.request_id}-{number}",
                output_token_ids=tokens.copy(),
                is_admitted=is_admitted,
                time_left_s=None if request.time_left_s is None else max(request.time_left_s - elapsed_s, 0.0),
                sampling=_rest_of(request.sampling, elapsed_s, has_prompt_scores),
                text_version=self._answers.text_version,
                numbers_version=answer.numbers_version,
            )
            num_before = len(tokens)
            prefer = self._route(attempt_request, avoid)
            attempt = Attempt(attempt_request.request_id, answer, avoid, prefer, is_moving=is_moving)
            is_moving = False
            try:
                # What was lost once with a request in it may be lost by it: there the scheduler finds out, elsewhere
                # it would start anew.
                take_by = None if stuck_since is None else stuck_since + self._replay_timeout_s
                stream = self._calls.events(attempt, attempt_request, may_leave=num_losses == 0, take_by=take_by)
                async with aclosing(stream) as events:
                    async for event in events:
                        if isinstance(event, FailureEvent) and event.is_pipeline_at_fault:
                            num_given_up += 1
                            if num_given_up < MAX_GIVEN_UP:
                                raise ReplicaLostError(event.message, is_suspicious=False)
                        if isinstance(event, TokenEvent):
                            assert event.index == len(tokens), "a token was lost or repeated"
                            tokens.append(event.token_id)
                            stuck_since, delay_s, num_losses = None, 0.0, 0
                        has_prompt_scores |= isinstance(event, PromptEvent)
                        yield event
                        if is_terminal(event):
                            return
            except FullError as full:
                self._refuse_if_full(attempt_request)
                refusals[full.replica_id] = full.overload
            except MovedError:
                is_moving = True
                refusals.clear()  # of what had a queue then; and what was taken once is not refused
            except AskElsewhereError:
                pass
            except NotTakenError:
                break
            except ReplicaLostError as lost:
                refusals.clear()
                stuck_since = clock() if stuck_since is None else stuck_since
                num_losses += lost.is_suspicious
                if num_losses >= MAX_REPLICA_LOSSES:
                    message = f"{num_losses} pipelines in a row were lost while they had this request"
                    yield FailureEvent(request.request_id, message)
                    return
                if clock() - stuck_since > self._replay_timeout_s:
                    break
                is_planned = isinstance(lost, ReplicaLeftError) and not lost.is_suspicious
                logger.log(
                    logging.INFO if is_planned else logging.WARNING,
                    "request %s is sent again after %d tokens: %s", request.request_id, len(tokens), lost,
                    extra={"request_id": request.request_id},
                )  # fmt: skip
                self._on_replay()
                if not isinstance(lost, ReplicaLeftError):
                    delay_s = max(delay_s, REPLAY_DELAY_S)
                await asyncio.sleep(delay_s)
                delay_s = min(max(2 * delay_s, REPLAY_DELAY_S), MAX_REPLAY_DELAY_S)
            finally:
                self._choice.ended(attempt_request.request_id, tokens[num_before:])
            is_admitted |= attempt.is_taken
        message = f"no pipeline took the request further for {self._replay_timeout_s:g} s"
        yield FailureEvent(request.request_id, message)

    def queue_wait_s(self) -> float:
        return self._replicas.shortest_wait_s()

    async def status(self) -> tuple[list[dict[str, Any]], list[str]]:
        try:
            answers = await _all_answers(self._pipelines.broadcast("status"), STATUS_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            if self._may_have_none and not self._replicas.running:
                problem = None if self._counts is None else await self._counts.problem()
                return [], [] if problem is None else [problem]
            return [], [f"no pipeline can be asked: {first_line(error)}"]
        pipelines = [answer for answer in answers if isinstance(answer, dict)]
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        answered = {pipeline["replica_id"] for pipeline in pipelines}
        silent = sorted(self._pipeline_ids - answered)
        names = silent if len(silent) == len(errors) else ["?"] * len(errors)  # an error doesn't say whose it is
        self._pipeline_ids = answered.union(silent) if errors else answered
        problems = [f"pipeline {n} does not answer: {first_line(e)}" for n, e in zip(names, errors, strict=True)]
        return sorted(pipelines, key=lambda pipeline: str(pipeline["replica_id"])), problems

    async def pipeline_changes(self) -> PipelineChanges | None:
        return None if self._counts is None else await self._counts.get()

    def _route(self, request: EngineRequest, avoid: frozenset[str]) -> str | None:
        """The replica to prefer for it, if any."""
        replicas = self._replicas
        self._choice.keep_only(replicas.running)
        route = self._choice.route(request, replicas.best(replicas.running - avoid), replicas.num_others)
        self._on_route(route.routed_by)
        return route.pipeline

    def _refuse_if_full(self, request: EngineRequest) -> None:
        """As a pipeline would, without asking one, if all have told that their queues are too long.

        Those that go before others are asked about all the same: for them only a pipeline knows.
        """
        if request.priority >= 0 and not request.is_admitted:
            check_wait(self._replicas.shortest_wait_s(), self._max_queue_wait_s, request.time_left_s)


async def _all_answers(call: DeploymentBroadcastResponse, timeout_s: float) -> list[Any]:
    """What each replica answered, or the exception that came instead.

    Ray 2.60's own `results_async` is all or nothing: one replica that hangs would hide the others.
    """
    replicas = await asyncio.wait_for(call._fetch_replica_results_async(), timeout_s)
    waits = [asyncio.wait_for(replica.get_async(), timeout_s) for replica in replicas]
    return await asyncio.gather(*waits, return_exceptions=True)


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
