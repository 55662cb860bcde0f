"""What became of a request: the record that is kept while it is answered, and the line that is logged at its end.

A record is part of the request's context: `Service` notes in it what the engine is asked and answers, whatever the
task; one HTTP request may be several sequences.
"""

import logging
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from gptj_serve.api.errors import http_status
from gptj_serve.types import BeamEvent, EngineRequest, Event, FinishReason, Task, TokenEvent, num_generated

logger = logging.getLogger(__name__)

MAX_ERROR_CHARACTERS = 300


class Outcome(StrEnum):
    """How a request ended: its finish reason, or one of these."""

    ANSWERED = "answered"  # it generated nothing
    REFUSED = "refused"  # for what the client asked, or its key allows
    OVERLOADED = "overloaded"  # for lack of room
    ABORTED = "aborted"  # the client left
    TIMED_OUT = "timeout"  # the request's own time was over
    FAILED = "failed"


def outcome_of(status: int) -> Outcome:
    """Of an error with this HTTP status."""
    if status == 504:
        return Outcome.TIMED_OUT
    if status == 503:
        return Outcome.OVERLOADED
    return Outcome.REFUSED if status < 500 else Outcome.FAILED


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
    route: str = ""
    request_id: str = ""
    arrived_at: float = field(default_factory=time.monotonic)
    observer: Observer = field(default_factory=NoObserver)
    api_key: str | None = None  # the name of the key that it came with
    task: Task | None = None  # of its first sequence
    num_sequences: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    ttft_s: float | None = None
    e2e_s: float = 0.0
    finish_reason: FinishReason | None = None  # of the sequence that ended last
    outcome: str = ""
    error: str | None = None  # what the client was told

    def add_sequence(self, request: EngineRequest) -> None:
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
        self.outcome = self.outcome or outcome_of(http_status(error))
        self.error = self.error or str(error)[:MAX_ERROR_CHARACTERS]

    def end(self) -> None:
        """Log the request."""
        self.outcome = self.outcome or self._outcome_in_full
        self.e2e_s = time.monotonic() - self.arrived_at
        self.observer.ended(self)
        parts = [f"{self.route}: {self.outcome}"]
        if self.error is not None:
            parts.append(self.error)
        if self.num_sequences:
            first = "" if self.ttft_s is None else f", the first after {self.ttft_s:.3f} s"
            parts.append(f"{self.num_prompt_tokens} prompt tokens, {self.num_generated_tokens} generated{first}")
        if self.api_key is not None:
            parts.append(f"API key {self.api_key}")
        logger.info(
            "%s; done after %.3f s",
            "; ".join(parts),
            self.e2e_s,
            extra={
                "request_id": self.request_id,
                "api_key": self.api_key,
                "path": self.route,
                "task": self.task,
                "outcome": self.outcome,
                "error": self.error,
                "num_sequences": self.num_sequences,
                "num_prompt_tokens": self.num_prompt_tokens,
                "num_generated_tokens": self.num_generated_tokens,
                "ttft_s": self.ttft_s,
                "e2e_s": self.e2e_s,
            },
        )

    @property
    def _outcome_in_full(self) -> str:
        if self.task is not Task.GENERATE:
            return Outcome.ANSWERED
        return self.finish_reason or FinishReason.STOP  # a stop string ends a sequence before its engine does
