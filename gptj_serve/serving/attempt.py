"""`Attempt`: a request on its way to a replica, or there; and what may end it before the request's own end."""

import asyncio
from dataclasses import dataclass, field

from gptj_serve.errors import OverloadedError
from gptj_serve.serving.answers import Answer
from gptj_serve.types import Event, Overload


class ReplicaLostError(Exception):
    """The replica that served a request, or was to, is gone or can't be reached."""

    def __init__(self, message: str, *, is_suspicious: bool = True) -> None:
        """`is_suspicious`: the request was there and may be the cause."""
        super().__init__(message)
        self.is_suspicious = is_suspicious


class ReplicaLeftError(ReplicaLostError):
    """It is not gone, but stops or has lost a stage, and another one is ready."""


class AskElsewhereError(Exception):
    """By what is known now, not this replica but another one may take the request, if any."""


class MovedError(AskElsewhereError):
    """It waits in a long queue, and at another replica nothing does."""


class FullError(AskElsewhereError):
    """The replica has no room for it."""

    def __init__(self, refusal: Overload) -> None:
        super().__init__(refusal)
        self.replica_id = refusal.replica_id
        self.overload = OverloadedError(refusal.message, refusal.retry_after_s)


class NotTakenError(Exception):
    """No replica took the request in time."""


class Leaves:
    """In an inbox: the pipeline is bringing a stage back, and others could go on at once."""


@dataclass(slots=True)
class Attempt:
    """A request on its way to a replica, none of those to `avoid` and that to `prefer` if it can, or there."""

    request_id: str  # of its own
    answer: Answer
    avoid: frozenset[str]
    prefer: str | None = None
    inbox: asyncio.Queue[Event | Exception | Leaves] = field(default_factory=asyncio.Queue)
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)
    is_moving: bool = False  # from the queue where it waited until another replica takes it
    is_taken: bool = False  # by a replica
    has_begun: bool = False  # an event has come

    def end_if_not_taken(self) -> None:
        if not self.is_taken:
            self.inbox.put_nowait(NotTakenError())


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
