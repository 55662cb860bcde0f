"""Streams that can be taken up again after any of their events: the event's id says all that this needs.

Nothing is kept. A client whose connection was cut sends its request again, with the last id that it got in
`Last-Event-ID`; any ingress process generates the answer again with the seed that the id tells, and leaves out what
was sent. An id, of at most 64 + 10 characters for each choice:

    1.<origin>.<events of choice 0>-<of choice 1>-…-<of none: usage and end marker>.<checksum>

The origin, 48 characters of base64url, packs what all ids of the stream have in common: the seed, the answer's own id,
when it was created, and a digest of these and of the request. The checksum is one of the counts and of all tokens so
far: if the model says something else the second time, the client is told, and never gets two halves of two answers.
"""

import base64
import hashlib
import re
import secrets
import struct
import time
import zlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Generic, NamedTuple, Protocol, Self, TypeVar

from fastapi import Depends, Header, Request
from pydantic import BaseModel

from gptj_serve.api.sampling import new_seed
from gptj_serve.errors import InvalidHeaderError

T = TypeVar("T")

LAST_EVENT_ID = "Last-Event-ID"

_EVENT_ID = re.compile(r"1\.([A-Za-z0-9_-]{48})\.([0-9]{1,9}(?:-[0-9]{1,9})+)\.[0-9a-f]{8}")
_COMMON = struct.Struct(">Q12sI")
_DIGEST_BYTES = 12
_CHECKSUM_MASK = 2**32 - 1


class Repeatable(Protocol):
    """The parameters of a generation that matter to doing it again."""

    @property
    def seed(self) -> int | None: ...

    @property
    def max_time(self) -> float | None: ...


class ChoiceEvent(NamedTuple, Generic[T]):
    """An event of a choice, with the tokens that it brings. It is a function of the request and its seed."""

    choice_index: int
    body: T
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Sent:
    """What a client has got already."""

    event_id: str
    counts: list[int]


class AnswerStream:
    """An answer that is being streamed: what its events have in common, and how far it has come.

    `event_id` is the id of the event that `rest` gave last, or that `closes` counted. An answer that nobody will ask
    for again needs no arguments; so has one without an `origin` no ids.
    """

    def __init__(
        self, seed: int = 0, key: bytes = b"", created: int | None = None, origin: str = "", sent: _Sent | None = None
    ) -> None:
        self.seed = seed
        self.key = (key or secrets.token_bytes(12)).hex()
        self.created = int(time.time()) if created is None else created
        self.num_tokens = 0
        self._origin = origin
        self._sent = sent
        self._counts: list[int] = []  # of each choice's events
        self._shown_counts: list[str] = []
        self._num_closing = 0  # events of no choice
        self._checksums: list[int] = []
        self._sum_of_checksums = 0

    @classmethod
    def of(cls, kind: str, body: BaseModel, parameters: Repeatable, last_event_id: str | None) -> Self:
        """The stream that a `kind` of route answers `body` with. Raises `InvalidHeaderError`."""
        if parameters.max_time is not None:
            if last_event_id is not None:
                reason = "a stream with max_time ends by the clock, so it can't be taken up again"
                raise InvalidHeaderError(LAST_EVENT_ID, last_event_id, reason)
            return cls(new_seed() if parameters.seed is None else parameters.seed)
        request = f"{kind} {body.model_dump_json()}".encode()
        if last_event_id is None:
            seed = new_seed() if parameters.seed is None else parameters.seed
            key, created = secrets.token_bytes(12), int(time.time())
            return cls(seed, key, created, _origin(_COMMON.pack(seed, key, created), request))
        match = _EVENT_ID.fullmatch(last_event_id)
        counts = [int(number) for number in match[2].split("-")] if match else []
        if match is None or not any(counts[:-1]):
            raise InvalidHeaderError(LAST_EVENT_ID, last_event_id, "is no id of an event of this service")
        common = base64.urlsafe_b64decode(match[1])[:-_DIGEST_BYTES]
        if _origin(common, request) != match[1]:
            raise InvalidHeaderError(LAST_EVENT_ID, last_event_id, "is the id of an event that answers another request")
        seed, key, created = _COMMON.unpack(common)
        return cls(seed, key, created, match[1], _Sent(last_event_id, counts))

    @property
    def event_id(self) -> str | None:
        if not self._origin:
            return None
        counts = f"{'-'.join(self._shown_counts)}-{self._num_closing}"
        checksum = zlib.crc32(counts.encode(), self._sum_of_checksums & _CHECKSUM_MASK)
        return f"1.{self._origin}.{counts}.{checksum:08x}"

    async def rest(
        self, events: AsyncGenerator[ChoiceEvent[T]], num_choices: int, num_closing: int
    ) -> AsyncGenerator[ChoiceEvent[T]]:
        """Of all events of the choices those that were not sent yet. At most `num_closing` events come after them.

        Before the first one it raises `InvalidHeaderError` if what was sent does not come out the same again.
        """
        self._counts = [0] * num_choices
        self._shown_counts = ["0"] * num_choices
        self._checksums = list(range(num_choices))  # each begins otherwise, though choices may be equal
        sent = self._sent
        if sent is not None and (len(sent.counts) != num_choices + 1 or sent.counts[-1] > num_closing):
            raise self._refused(sent)
        num_missing = 0 if sent is None else sum(sent.counts[:-1])
        async with aclosing(events if sent is None else self._sent_first(events, sent)) as ordered:
            async for event in ordered:
                self._count(event)
                if num_missing == 0:
                    yield event
                    continue
                num_missing -= 1
                if num_missing == 0 and sent is not None:
                    self._num_closing = sent.counts[-1]
                    if self.event_id != sent.event_id:
                        raise self._refused(sent)
                    self._num_closing = 0

    def closes(self) -> bool:
        """Count an event that is of no choice and comes after all of them; whether it is still to be sent."""
        self._num_closing += 1
        return self._sent is None or self._num_closing > self._sent.counts[-1]

    def _count(self, event: ChoiceEvent[T]) -> None:
        index, _, token_ids = event
        before = self._checksums[index]
        after = zlib.crc32(struct.pack(f"<{len(token_ids)}I", *token_ids), before)
        self._checksums[index] = after
        self._sum_of_checksums += after - before
        self._counts[index] += 1
        self._shown_counts[index] = str(self._counts[index])
        self.num_tokens += len(token_ids)

    async def _sent_first(self, events: AsyncGenerator[ChoiceEvent[T]], sent: _Sent) -> AsyncGenerator[ChoiceEvent[T]]:
        """Choices may come interleaved otherwise than they did: what is ahead of the client's place waits."""
        missing = sent.counts[:-1]
        num_missing = sum(missing)
        held: list[ChoiceEvent[T]] = []
        async with aclosing(events):
            async for event in events:
                if num_missing == 0:
                    yield event
                elif missing[event.choice_index] == 0:
                    held.append(event)
                else:
                    missing[event.choice_index] -= 1
                    num_missing -= 1
                    yield event
                    if num_missing == 0:
                        for waiting in held:
                            yield waiting
                        held.clear()
        if num_missing:
            raise self._refused(sent)

    def _refused(self, sent: _Sent) -> InvalidHeaderError:
        reason = "the answer came out otherwise than what this event ends: ask for a new one, without this header"
        return InvalidHeaderError(LAST_EVENT_ID, sent.event_id, reason)


def _origin(common: bytes, request: bytes) -> str:
    digest = hashlib.blake2b(common + request, digest_size=_DIGEST_BYTES).digest()
    return base64.urlsafe_b64encode(common + digest).decode()


def _last_event_id(
    request: Request,
    last_event_id: Annotated[
        str | None,
        Header(
            alias=LAST_EVENT_ID,
            description="The id of the last event that came, of a stream that was cut: the same body is then answered "
            "with the events after it.",
        ),
    ] = None,
) -> str | None:
    return None if last_event_id is None else ", ".join(request.headers.getlist(LAST_EVENT_ID))


LastEventID = Annotated[str | None, Depends(_last_event_id)]
"""What a route takes that streams."""


def refuse_if_whole(last_event_id: str | None) -> None:
    """Raises `InvalidHeaderError` if the header came with a request for an answer in one piece."""
    if last_event_id is not None:
        raise InvalidHeaderError(LAST_EVENT_ID, last_event_id, "goes with a stream only")
