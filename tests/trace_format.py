"""The rules of the Trace Event Format, as far as `profiling.trace_events` uses it, for traces to be held against."""

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]

METADATA = {"process_name": ("name", str), "thread_name": ("name", str), "thread_sort_index": ("sort_index", int)}


def read_trace(file: Path) -> list[Event]:
    """The events of a file that follows the rules."""
    content = file.read_bytes()
    assert (content[:2] == b"\x1f\x8b") == (file.suffix == ".gz")
    trace = json.loads(gzip.decompress(content) if file.suffix == ".gz" else content)
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    assert all(isinstance(value, str) for value in trace["otherData"].values())
    check(trace["traceEvents"])
    return trace["traceEvents"]


def check(events: list[Event]) -> None:
    process_of: dict[int, int] = {}
    for event in events:
        assert isinstance(event["name"], str)
        assert event["name"]
        assert type(event["pid"]) is type(event["tid"]) is int
        assert min(event["pid"], event["tid"]) > 0
        assert process_of.setdefault(event["tid"], event["pid"]) == event["pid"], "a track of two processes"
        assert nanoseconds(event["ts"]) >= 0
        CHECKS[event["ph"]](event)
    kinds = [event["ph"] == "M" for event in events]
    assert kinds == sorted(kinds, reverse=True), "metadata come first"
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times), "time goes back"
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    assert {event["tid"] for event in events if event["ph"] in "Xi"} <= named
    tracks: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["tid"]].append(event)
    for slices in tracks.values():
        _check_nesting(slices)
    _check_arrows(events)


def nanoseconds(microseconds: float) -> int:
    assert type(microseconds) in (int, float)
    assert round(microseconds * 1000) / 1000 == microseconds, "finer than a nanosecond"
    return round(microseconds * 1000)


def span(event: Event) -> tuple[int, int]:
    start = nanoseconds(event["ts"])
    return start, start + nanoseconds(event["dur"])


def _check_metadata(event: Event) -> None:
    key, kind = METADATA[event["name"]]
    assert type(event["args"][key]) is kind


def _check_slice(event: Event) -> None:
    assert nanoseconds(event["dur"]) >= 0
    assert isinstance(event["args"], dict)


def _check_instant(event: Event) -> None:
    assert event["s"] in ("g", "p", "t")


def _check_counter(event: Event) -> None:
    assert event["args"]
    assert all(type(value) in (int, float) for value in event["args"].values())


def _check_arrow(event: Event) -> None:
    assert type(event["id"]) is int
    assert event.get("bp") == (None if event["ph"] == "s" else "e")


CHECKS = {
    "M": _check_metadata, "X": _check_slice, "i": _check_instant, "C": _check_counter, "s": _check_arrow,
    "f": _check_arrow,
}  # fmt: skip


def _check_nesting(slices: list[Event]) -> None:
    """In the order of the file: whoever begins while another is under way must end with it or before."""
    under_way: list[int] = []
    for event in slices:
        start, end = span(event)
        while under_way and under_way[-1] <= start:
            under_way.pop()
        assert not under_way or end <= under_way[-1], f"{event} ends after the slice that it is in"
        under_way.append(end)


def _check_arrows(events: list[Event]) -> None:
    """Each leads from one microbatch's slice to the next, and each end follows the beginning of its slice at once: the
    slice that began last on its track is the one that readers tie it to."""
    ends: dict[int, list[tuple[Event, Event]]] = defaultdict(list)
    began_last: dict[int, Event] = {}
    for event in events:
        if event["ph"] == "X":
            began_last[event["tid"]] = event
        elif event["ph"] in "sf":
            ends[event["id"]].append((event, began_last[event["tid"]]))
    for arrow in ends.values():
        (start, left), (end, reached) = arrow
        assert (start["ph"], end["ph"]) == ("s", "f")
        assert [start[key] for key in ("name", "cat", "pid")] == [end[key] for key in ("name", "cat", "pid")]
        assert (left["ts"], reached["ts"]) == (start["ts"], end["ts"])
        assert left["name"] == reached["name"]
        assert left["tid"] != reached["tid"]
