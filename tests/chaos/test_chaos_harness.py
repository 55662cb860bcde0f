"""What the judge of a service under faults says, and that it can do what it says it does."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq

from tests.chaos import links
from tests.chaos.deployment import REPLAY_TIMEOUT_S
from tests.chaos.faults import Fault, FaultKind, Resources
from tests.chaos.repair import observe_downtimes
from tests.chaos.report import Report, leaks
from tests.chaos.traffic import Call, Outcome, Patience, Record, perform

CALL = Call("/generate", {"inputs": "x", "stream": True})

EVENTS = [{"index": n, "token": n * 10, "generated_text": None, "details": None} for n in range(4)]
EVENTS[-1] |= {"generated_text": "whole", "details": {}}

WHOLE = {"indices": [0, 1, 2, 3], "tokens": [0, 10, 20, 30], "text": "whole", "details": {}}


def as_bytes(number: int, has_id: bool) -> bytes:
    return (f"id: a-{number}\n" if has_id else "").encode() + f"data: {json.dumps(EVENTS[number])}\n\n".encode()


class Cut(httpx.AsyncByteStream):
    """Some bytes, then the end of the connection."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._data
        raise httpx.ReadError("the connection was cut")


class Service:
    """Answers with what it was given, one after the other, and keeps what it was asked."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self._answers = list(answers)
        self.last_event_ids: list[str | None] = []

    async def call(self, resuming_s: float = 60.0) -> tuple[Any, Record]:
        record = Record(CALL, time.monotonic())
        async with httpx.AsyncClient(transport=httpx.MockTransport(self._handle), base_url="http://service") as client:
            return await perform(client, CALL, record, Patience(resuming_s, 0.0, 0.0)), record

    def _handle(self, request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content) == CALL.body
        self.last_event_ids.append(request.headers.get("Last-Event-ID"))
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


async def test_a_cut_stream_is_taken_up_after_its_last_whole_event() -> None:
    service = Service(
        httpx.Response(200, stream=Cut(as_bytes(0, True) + as_bytes(1, True) + as_bytes(2, True)[:-1])),
        httpx.ConnectError("refused"),
        httpx.Response(503, text="no such replica"),
        httpx.Response(404, text="Path '/generate' not found"),  # a proxy without its routes
        httpx.Response(200, stream=Cut(as_bytes(2, True))),
        httpx.Response(200, content=as_bytes(3, True)),
    )
    answer, record = await service.call()
    assert answer == WHOLE
    assert service.last_event_ids == [None, "a-1", "a-1", "a-1", "a-1", "a-2"]
    assert record.num_resumptions == 5
    assert len(record.arrivals) == 4


async def test_only_line_feeds_end_a_line() -> None:
    """JSON need not escape U+2028 and U+0085."""
    texts = ["a\u2028data: b", "c\u0085\u0085d"]
    events = [EVENTS[0] | {"token": texts[0]}, EVENTS[-1] | {"token": texts[1]}]
    data = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
    answer, record = await Service(httpx.Response(200, content=data.encode())).call()
    assert answer is not None, record
    assert answer["tokens"] == texts


async def test_who_gets_no_connection_asked_nothing() -> None:
    answer, record = await Service(httpx.ConnectError("refused")).call()
    assert (answer, record.outcome) == (None, Outcome.UNREACHABLE)


async def test_a_cut_stream_without_ids_is_broken() -> None:
    service = Service(httpx.Response(200, stream=Cut(as_bytes(0, False) + as_bytes(1, False))))
    answer, record = await service.call()
    assert (answer, record.outcome, record.num_resumptions) == (None, Outcome.BROKEN, 0)


async def test_a_refused_resumption_is_refused() -> None:
    error = {"error": "the stream a is not known", "error_type": "validation"}
    service = Service(httpx.Response(200, stream=Cut(as_bytes(0, True))), httpx.Response(422, json=error))
    answer, record = await service.call()
    assert (answer, record.outcome) == (None, Outcome.REFUSED)
    assert "is not known" in record.detail


async def test_resuming_ends_some_time() -> None:
    service = Service(httpx.Response(200, stream=Cut(as_bytes(0, True))), *[httpx.ConnectError("refused")] * 10**5)
    answer, record = await service.call(resuming_s=0.05)
    assert (answer, record.outcome) == (None, Outcome.BROKEN)


@pytest.mark.parametrize("outcome", [Outcome.BROKEN, Outcome.UNREACHABLE, Outcome.REFUSED])
def test_only_a_seen_outage_excuses_a_call_without_an_answer(outcome: Outcome) -> None:
    report = Report(0.0, 1.0, faults=[Fault(FaultKind.KILL_PROXY, 1, 100.0, repaired_at=107.0)])
    report.records = [
        Record(CALL, started_at, outcome, ended_at)
        for started_at, ended_at in [(90, 99), (99, 101), (106, 106.1), (107.5, 108)]
    ]
    assert [record.started_at for record in report.unexcused()] == [90, 107.5]
    report.faults = [Fault(FaultKind.KILL_STAGE, 1, 100.0)]
    assert len(report.unexcused()) == 4


@pytest.mark.parametrize("outcome", [Outcome.CHANGED, Outcome.HANGING])
def test_nothing_excuses_another_answer_or_none_at_all(outcome: Outcome) -> None:
    report = Report(0.0, 1.0, faults=[Fault(FaultKind.KILL_PROXY, 1, 100.0)])
    report.records = [Record(CALL, 99, outcome, 101)]
    report.downtimes = [(0, 1000)]
    assert report.unexcused() == report.records


def test_without_any_pipeline_for_too_long_a_call_may_be_refused() -> None:
    report = Report(0.0, 1.0, downtimes=[(100, 100 + REPLAY_TIMEOUT_S - 1), (300, 300 + REPLAY_TIMEOUT_S + 1)])
    report.records = [
        Record(CALL, 90, Outcome.REFUSED, 100 + REPLAY_TIMEOUT_S),
        Record(CALL, 290, Outcome.REFUSED, 300 + REPLAY_TIMEOUT_S),
        Record(CALL, 290, Outcome.BROKEN, 300 + REPLAY_TIMEOUT_S),
    ]
    assert report.unexcused() == [report.records[0], report.records[2]]


async def test_downtimes_are_what_the_service_says_of_its_pipelines() -> None:
    """Two in a row make one; where nobody answers, nothing is known."""
    says = [{"is_ready": ready} for ready in (True, False, False, True, False)] + [None, {"is_ready": False}]
    all_asked = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /ready ")
        said = says.pop(0) if says else {"is_ready": True}
        if said is not None:
            body = json.dumps(said).encode()
            writer.write(b"HTTP/1.1 503 -\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        writer.close()
        if not says:
            all_asked.set()

    downtimes: list[tuple[float, float]] = []
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        began_at = time.monotonic()
        observing = asyncio.create_task(observe_downtimes(f"http://127.0.0.1:{port}", downtimes, 0.0))
        await asyncio.wait_for(all_asked.wait(), 30)
        while len(downtimes) < 3:
            await asyncio.sleep(0.01)
        observing.cancel()
    assert len(downtimes) == 3
    moments = [began_at, *(moment for span in downtimes for moment in span), time.monotonic()]
    assert moments == sorted(moments)


def test_throughput_and_recovery_are_told_by_kind() -> None:
    arrivals = [n / 10 for n in range(100)] + [12.5 + n / 10 for n in range(100)]  # a pause from 9.9 to 12.5
    report = Report(0.0, 10.0, ended_at=22.5, records=[Record(CALL, 0.0, Outcome.EQUAL, 22.5, arrivals)])
    report.faults = [Fault(FaultKind.CUT_LINK, 1, 10.0)]
    figures = report.as_dict()
    assert figures["undisturbed_events_per_s"] == 10
    cut = figures["kinds"]["cut link"]
    assert cut["recovery_s"] == {"num": 1, "p50": 2.5, "p99": 2.5, "max": 2.5}
    assert [cut["events_ratio_around"][second] for second in (-2, 0, 1, 2, 3)] == [1, 0, 0, 0.5, 1]
    assert json.loads(json.dumps(figures))["outcomes"] == {"equal": 1}


def test_leaks_are_named() -> None:
    before = {"STAGE": Resources(2, 100, 40, 60, 600 << 20), "PROXY": Resources(1, 50, 20, 30, 150 << 20)}
    assert leaks(before, before) == []
    after = before | {"STAGE": Resources(3, 100, 90, 60, 2000 << 20)}
    assert [leak.split()[:2] for leak in leaks(before, after)] == [
        ["STAGE:", "2"], ["STAGE:", "num_sockets"], ["STAGE:", "memory_bytes"],
    ]  # fmt: skip


def test_a_link_is_found_by_its_path_and_cut_under_both_ends(tmp_path: Path) -> None:
    directory = tmp_path / "gptj_serve-1-abc"
    directory.mkdir()
    context = zmq.Context[zmq.Socket[bytes]]()
    receiver, sender = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    try:
        receiver.bind(f"ipc://{directory}/0-steps")
        events = sender.get_monitor_socket(zmq.Event.DISCONNECTED)
        sender.connect(f"ipc://{directory}/0-steps")
        sender.send(b"here")
        assert receiver.recv() == b"here"
        (link,) = links.links_of([os.getpid()])
        assert link.name == "0-steps"
        assert links.cut(link) is True
        assert events.poll(5000)
    finally:
        context.destroy(linger=0)
    assert links.links_of([os.getpid()]) == []
