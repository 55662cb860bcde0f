"""What became of a request: the record that is kept while it is answered, and the line that is logged at its end.

A record travels as a context variable, as `request_context` does: `Service` notes in it what the engine is asked and
answers, whatever the task; one HTTP request may be several sequences.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj_serve.errors import InvalidRequestError, OverloadedError
from gptj_serve.types import BeamEvent, EngineRequest, Event, FinishReason, Task, TokenEvent, num_generated

logger = logging.getLogger(__name__)


class Outcome(StrEnum):
    """How a request ended: its finish reason, or one of these."""

    ANSWERED = "answered"  # it generated nothing
    REFUSED = "refused"
    ABORTED = "aborted"  # the client left
    FAILED = "failed"


class Observer(Protocol):
    """Who measures requests. Called in the loop that answers them, so it must be quick."""

    def first_token(self, record: "RequestRecord", seconds: float) -> None:
        """The request's first token, so long after its arrival."""

    def next_token(self, seconds: float) -> None:
        """A further token of a sequence, so long after the one before."""

    def ended(self, record: "RequestRecord") -> None: ...


class NoObserver:
    def first_token(self, record: "RequestRecord", seconds: float) -> None:
        pass

    def next_token(self, seconds: float) -> None:
        pass

    def ended(self, record: "RequestRecord") -> None:
        pass


@dataclass(slots=True)
class RequestRecord:
    route: str
    observer: Observer = field(default_factory=NoObserver)
    arrived_at: float = field(default_factory=time.monotonic)
    request_id: str = ""
    task: Task | None = None  # of its first sequence
    num_sequences: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    ttft_s: float | None = None
    e2e_s: float = 0.0
    finish_reason: FinishReason | None = None  # of the sequence that ended last
    outcome: str = ""

    def add_sequence(self, request: EngineRequest, request_id: str) -> None:
        self.request_id = request_id
        self.task = self.task or request.task
        self.num_sequences += 1
        self.num_prompt_tokens += len(request.prompt_token_ids) + len(request.continuation_token_ids)

    def add_event(self, event: Event, last_at: float | None) -> float | None:
        """Take note of a sequence's event, whose last token came at `last_at`; returns when its newest came."""
        if isinstance(event, TokenEvent):
            now = time.monotonic()
            if self.ttft_s is None:
                self.ttft_s = now - self.arrived_at
                self.observer.first_token(self, self.ttft_s)
            if last_at is not None:
                self.observer.next_token(now - last_at)
            self.num_generated_tokens += 1
            self.finish_reason = event.finish_reason
            return now
        self.num_generated_tokens += num_generated(event)
        if isinstance(event, BeamEvent):
            self.finish_reason = event.beams[0].finish_reason
        return last_at

    def fail(self, error: Exception) -> None:
        """Take note of what ends the request; what came first is the cause."""
        refused = isinstance(error, InvalidRequestError | OverloadedError)
        self.outcome = self.outcome or (Outcome.REFUSED if refused else Outcome.FAILED)

    def end(self) -> None:
        """Log the request, if the engine had to do with it."""
        self.outcome = self.outcome or self._outcome_in_full
        self.e2e_s = time.monotonic() - self.arrived_at
        self.observer.ended(self)
        if not self.num_sequences:
            return  # the access log has it
        first = "" if self.ttft_s is None else f", the first after {self.ttft_s:.3f} s"
        logger.info(
            "%s: %s; %d prompt tokens, %d generated%s; done after %.3f s",
            self.route, self.outcome, self.num_prompt_tokens, self.num_generated_tokens, first,
            self.e2e_s,
            extra={
                "request_id": self.request_id,
                "path": self.route,
                "task": self.task,
                "outcome": self.outcome,
                "num_sequences": self.num_sequences,
                "num_prompt_tokens": self.num_prompt_tokens,
                "num_generated_tokens": self.num_generated_tokens,
                "ttft_s": self.ttft_s,
                "e2e_s": self.e2e_s,
            },
        )  # fmt: skip

    @property
    def _outcome_in_full(self) -> str:
        if self.task is not Task.GENERATE:
            return Outcome.ANSWERED
        return self.finish_reason or FinishReason.STOP  # a stop string ends a sequence before its engine does


_current: ContextVar[RequestRecord] = ContextVar("request_record")


def current_record() -> RequestRecord:
    """That of the request that is being answered; outside of any, one that nobody reads."""
    return _current.get(None) or RequestRecord("")


class RequestLog:
    """Keeps the records of the requests that are being answered, by HTTP or not."""

    def __init__(self, observer: Observer | None = None) -> None:
        self._observer = observer or NoObserver()
        self.num_requests = 0  # being answered now

    @contextmanager
    def recording(self, route: str) -> Iterator[RequestRecord]:
        """All that is done inside is done for one request, which ends in full, with an error or by being cancelled."""
        record = RequestRecord(route, self._observer)
        token = _current.set(record)
        self.num_requests += 1
        try:
            yield record
        except Exception as error:
            record.fail(error)
            raise
        except BaseException:
            record.outcome = record.outcome or Outcome.ABORTED
            raise
        finally:
            self.num_requests -= 1
            with suppress(ValueError):  # a stream may be closed from elsewhere than where it was begun
                _current.reset(token)
            record.end()


class RecordRequests:
    """ASGI middleware: a record for each HTTP request that is sent with POST, since all others ask for no task."""

    def __init__(self, app: ASGIApp, log: RequestLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        status, is_complete = 0, False

        async def watch(message: Message) -> None:
            nonlocal status, is_complete
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                is_complete = not message.get("more_body", False)

        with self._log.recording(f"POST {scope['path']}") as record:
            await self._app(scope, receive, watch)
            if not is_complete:
                record.outcome = record.outcome or Outcome.ABORTED
            elif status >= 400:
                record.outcome = record.outcome or (Outcome.FAILED if status in (500, 504) else Outcome.REFUSED)
        return None
