"""What is known of the request that is being answered, wherever in the answering it is needed.

It travels as a context variable: what a request starts (tasks, streams, threads) sees that request's own.
"""

import itertools
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from gptj_serve.api.request_record import RequestRecord
from gptj_serve.errors import RequestTimeoutError


class Account(Protocol):
    """Who pays for a request's tokens."""

    def spend(self, num_tokens: int) -> None:
        """Take note of tokens that were read or generated; never refuses, since they are spent already."""


def new_request_id() -> str:
    return secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Times are those of `time.monotonic()`."""

    request_id: str = field(default_factory=new_request_id)
    arrived_at: float = field(default_factory=time.monotonic)
    deadline: float | None = None
    priority: int = 0  # of what sets none itself
    session_id: str = ""  # empty: of none
    account: Account | None = None
    record: RequestRecord = field(default_factory=RequestRecord)  # without a `RequestLog`, one that nobody reads
    _answer_id: str = field(default_factory=lambda: secrets.token_hex(4), init=False)
    _sequence_numbers: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False, compare=False)

    def new_sequence_id(self) -> str:
        """`<request id>-<the answer's own>-<number>`, for one of the request's sequences.

        A client may send the id of its request twice, at once even: what is before the last dash is this answer's.
        """
        return f"{self.request_id}-{self._answer_id}-{next(self._sequence_numbers)}"

    @property
    def time_left_s(self) -> float | None:
        """Not below 0; None if it has no end."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    @property
    def is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def out_of_time(self) -> RequestTimeoutError:
        return RequestTimeoutError(f"the request was not finished after {time.monotonic() - self.arrived_at:.3g} s")


_current: ContextVar[RequestContext] = ContextVar("request_context")


def current_request() -> RequestContext:
    """The request that is being answered; outside of any, one of its own for each call."""
    return _current.get(None) or RequestContext()


@contextmanager
def answering(request: RequestContext) -> Iterator[None]:
    """All that is done inside is done for `request`."""
    token = _current.set(request)
    try:
        yield
    finally:
        with suppress(ValueError):  # a stream may be closed from elsewhere than where it was begun
            _current.reset(token)
