"""Requests of every task, and whether an answer under faults is the one that an undisturbed service gave."""

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import httpx

TOLERANCE = 1e-4
"""Of scores and log-probabilities: a microbatch's other rows change their last bits."""

OPENING = "It was the best of times, it was the worst of times. "


class Outcome(StrEnum):
    EQUAL = "equal"
    CHANGED = "changed"  # another answer than undisturbed, or a stream with a gap or a repeat
    REFUSED = "refused"  # one clear error: a status with an error object, or a last event with one
    BROKEN = "broken"  # the connection ended without an end of the answer
    UNREACHABLE = "unreachable"  # no connection came about, so nothing was asked
    HANGING = "hanging"


@dataclass(frozen=True)
class Call:
    path: str
    body: dict[str, Any]

    @property
    def is_streamed(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass
class Record:
    """How one call went; times are those of `time.monotonic()`."""

    call: Call
    started_at: float
    outcome: Outcome = Outcome.HANGING
    ended_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of a stream's events
    num_resumptions: int = 0  # how often the rest of a stream was asked for
    detail: str = ""


@dataclass(frozen=True)
class Patience:
    """How long the rest of a stream that was cut is asked for, before it counts as broken."""

    resuming_s: float = 60.0
    retry_delay_s: float = 0.2
    unreachable_delay_s: float = 1.0


def calls(rng: random.Random, count: int) -> list[Call]:
    """A mixture of all tasks and options; the same for the same random numbers."""
    return [rng.choice(_MAKERS)(rng) for _ in range(count)]


def _prompt(rng: random.Random) -> str:
    return OPENING * rng.randrange(4) + f"Chapter {rng.randrange(1000)}."


def _generate(rng: random.Random) -> Call:
    options = rng.choice(
        [
            {},
            {"do_sample": True, "seed": rng.randrange(2**31)},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
            {"temperature": 0.8, "top_p": 0.9, "seed": rng.randrange(2**31), "prompt_lookup_num_tokens": 4},
            {"guidance_scale": 1.5, "negative_prompt": "The President"},
            {"grammar": {"type": "regex", "value": "[a-z ]{40,400}"}},
            {"stop": ["the ", "ing"], "max_time": 600},
        ]
    )
    parameters = {"max_new_tokens": rng.randrange(40, 300), "details": True} | options
    return Call("/generate", {"inputs": _prompt(rng), "parameters": parameters, "stream": rng.random() < 0.7})


def _beams(rng: random.Random) -> Call:
    parameters = {"max_new_tokens": rng.randrange(10, 40), "num_beams": rng.randrange(2, 5), "details": True}
    return Call("/generate", {"inputs": _prompt(rng), "parameters": parameters})


def _complete(rng: random.Random) -> Call:
    body: dict[str, Any] = {"model": "gptj-demo", "prompt": [_prompt(rng), _prompt(rng)], "max_tokens": 30}
    body |= {"seed": rng.randrange(2**31), "n": 2, "return_token_ids": True, "logprobs": rng.choice([None, 2])}
    return Call("/v1/completions", body | {"stream": rng.random() < 0.5, "echo": rng.random() < 0.3})


def _classify(rng: random.Random) -> Call:
    texts = ["how much money is in my account", "book a flight to Oslo", _prompt(rng)]
    return Call("/classify", {"inputs": rng.sample(texts, rng.randrange(1, 4)), "parameters": {"top_k": 5}})


def _zero_shot(rng: random.Random) -> Call:
    return Call("/classify", {"inputs": [_prompt(rng)], "parameters": {"candidate_labels": ["sea", "war", "love"]}})


def _answer(rng: random.Random) -> Call:
    context = f"Anna {rng.randrange(1000)} lives in Paris. " + OPENING * rng.randrange(20)
    return Call("/qa", {"inputs": {"question": "Where does Anna live?", "context": context}})


_MAKERS = [_generate, _generate, _generate, _complete, _beams, _classify, _zero_shot, _answer]


async def perform(client: httpx.AsyncClient, call: Call, record: Record, patience: Patience = Patience()) -> Any:
    """The answer in a form that can be compared, or None with the record's outcome set.

    A stream that was cut is taken up again, if its events bore ids.
    """
    try:
        if call.is_streamed:
            return await _perform_stream(client, call, record, patience)
        response = await client.post(call.path, json=call.body)
        if response.status_code == 200:
            return response.json()
        return _refused(record, response.status_code, response.text)
    except httpx.TimeoutException as error:
        record.outcome, record.detail = Outcome.HANGING, repr(error)
    except httpx.ConnectError as error:
        record.outcome, record.detail = Outcome.UNREACHABLE, repr(error)
    except httpx.TransportError as error:
        record.outcome, record.detail = Outcome.BROKEN, repr(error)
    finally:
        record.ended_at = time.monotonic()
    return None


async def _perform_stream(client: httpx.AsyncClient, call: Call, record: Record, patience: Patience) -> Any:
    stream = _Stream(call, record)
    give_up_at = math.inf
    while True:
        delay_s = patience.retry_delay_s
        headers = {"Last-Event-ID": stream.last_id} if stream.last_id is not None else {}
        try:
            async with client.stream("POST", call.path, json=call.body, headers=headers) as response:
                if response.status_code == 200:
                    give_up_at = math.inf
                    await stream.read(response)
                else:
                    body = (await response.aread()).decode()
                    _refused(record, response.status_code, body)
                    if response.status_code < 500 and record.outcome is Outcome.REFUSED:
                        return None
        except httpx.TransportError as error:
            if stream.last_id is None or isinstance(error, httpx.TimeoutException):
                raise
            record.outcome, record.detail = Outcome.BROKEN, repr(error)
            if isinstance(error, httpx.ConnectError):
                delay_s = patience.unreachable_delay_s
        if stream.is_complete:
            return stream.answer()
        if stream.is_refused or stream.last_id is None:
            return None
        give_up_at = min(give_up_at, time.monotonic() + patience.resuming_s)
        if time.monotonic() > give_up_at:
            return None
        record.num_resumptions += 1
        await asyncio.sleep(delay_s)


class _Stream:
    """The events of one streamed answer, over as many connections as it takes."""

    def __init__(self, call: Call, record: Record) -> None:
        self._call = call
        self._record = record
        self._events: list[dict[str, Any]] = []
        self.last_id: str | None = None
        self.is_complete = False
        self.is_refused = False  # by an event with an error

    async def read(self, response: httpx.Response) -> None:
        """Sets the record's outcome where the answer does not end. An event counts when its empty line is there."""
        self._record.outcome, self._record.detail = Outcome.BROKEN, f"ended after {len(self._events)} events"
        buffer = b""
        async for part in response.aiter_bytes():
            *events, buffer = (buffer + part).split(b"\n\n")
            for event in events:
                # By bytes: str.splitlines, as in httpx's aiter_lines, also splits where JSON has U+2028 or U+0085.
                fields = dict(line.split(": ", 1) for line in event.decode().split("\n"))
                self.last_id = fields.get("id", self.last_id)
                self._take(fields["data"])

    def _take(self, data: str) -> None:
        self._record.arrivals.append(time.monotonic())
        if data == "[DONE]":
            self.is_complete = True
            return
        event = json.loads(data)
        if "error" in event:
            self._record.outcome, self._record.detail = Outcome.REFUSED, data
            self.is_refused = True
            return
        self._events.append(event)
        self.is_complete |= event.get("generated_text") is not None

    def answer(self) -> dict[Any, Any]:
        """What the events add up to."""
        return _generated(self._events) if self._call.path == "/generate" else _completed(self._events)


def _generated(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "indices": [event["index"] for event in events],
        "tokens": [event["token"] for event in events],
        "text": events[-1]["generated_text"],
        "details": events[-1]["details"],
    }


def _completed(events: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for part in event["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "token_ids": [], "finish_reason": None})
            assert choice["finish_reason"] is None, "a choice went on after its end"
            choice["text"] += part["text"]
            choice["token_ids"] += part["token_ids"]
            choice["finish_reason"] = part["finish_reason"]
    return choices


def _refused(record: Record, status: int, body: str) -> None:
    record.outcome, record.detail = Outcome.REFUSED, f"{status}: {body[:300]}"
    try:
        has_error = "error" in json.loads(body)
    except ValueError:
        has_error = False
    if not has_error:
        record.outcome = Outcome.BROKEN


_VOLATILE = {"id", "created"}


def is_same(answer: Any, expected: Any) -> bool:
    """Equal but for the last bits of numbers, and for the ids and times of OpenAI's objects."""
    if isinstance(expected, dict):
        if not isinstance(answer, dict) or answer.keys() != expected.keys():
            return False
        return all(key in _VOLATILE or is_same(answer[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return (
            isinstance(answer, list)
            and len(answer) == len(expected)
            and all(is_same(one, other) for one, other in zip(answer, expected, strict=True))
        )
    if isinstance(expected, float):
        return isinstance(answer, int | float) and math.isclose(answer, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(answer == expected)


async def undisturbed_answers(client: httpx.AsyncClient, wanted: Sequence[Call], concurrency: int = 16) -> list[Any]:
    """What a healthy service answers, which must be an answer."""
    slots = asyncio.Semaphore(concurrency)

    async def one(call: Call) -> Any:
        async with slots:
            record = Record(call, time.monotonic())
            answer = await perform(client, call, record)
            assert answer is not None, f"{call} without any fault: {record.outcome}: {record.detail}"
            return answer

    return await asyncio.gather(*map(one, wanted))
