"""Timelines as trace events, held against the format's rules (`trace_format`)."""

import json
from pathlib import Path
from typing import Any

import pytest
from trace_format import Event, check, read_trace, span

from gptj_serve.engine.milestones import Milestone
from gptj_serve.engine.timeline import Occupancy, Operator, Passage, SchedulerSpan, Span, Timeline
from gptj_serve.errors import ConfigError
from gptj_serve.profiling.trace_events import trace_events, write_trace

T0 = 1_795_694_574.0  # Unix time: its float is exact to a quarter of a microsecond


def timeline(num_stages: int = 3, num_microbatches: int = 4) -> Timeline:
    """Each step lasts 2 ms, each handoff 0.5 ms."""
    made = Timeline(num_stages)
    for number in range(num_microbatches):
        for stage_index in range(num_stages):
            start_s = T0 + 2.5e-3 * (number + stage_index)
            handoff_s = 0.0005 if stage_index else None
            made.spans.append(Span(number, stage_index, start_s, start_s + 2e-3, 3, 12, 2, 10, handoff_s))
    return made


def of_phase(events: list[Event], phase: str, **values: Any) -> list[Event]:
    return [e for e in events if e["ph"] == phase and all(e[key] == value for key, value in values.items())]


def track(events: list[Event], name: str) -> int:
    (event,) = [e for e in of_phase(events, "M", name="thread_name") if e["args"]["name"] == name]
    return event["tid"]


def test_every_microbatch_is_a_slice_on_every_stages_track():
    events = trace_events({"demo": timeline()})
    check(events)
    assert [e["args"] for e in of_phase(events, "M", name="process_name")] == [{"name": "demo"}]
    for stage_index in range(3):
        slices = of_phase(events, "X", tid=track(events, f"stage {stage_index}"))
        assert [e["name"] for e in slices] == [f"microbatch {number}" for number in range(4)]
        assert [e["ts"] for e in slices] == pytest.approx([2500 * (n + stage_index) for n in range(4)], abs=0.5)
        assert [e["dur"] for e in slices] == pytest.approx([2000] * 4, abs=0.5)


def test_a_slice_says_what_is_known_of_its_step():
    made = timeline(2, 1)
    made.spans.append(Span(1, 0, T0 + 1, T0 + 2, num_rows=7, num_tokens=9))
    events = of_phase(trace_events({"demo": made}), "X")
    figures = {"num_rows": 3, "num_tokens": 12, "num_decode_rows": 2, "num_prompt_tokens": 10}
    assert [e["args"] for e in events] == [
        figures, figures | {"handoff_us": 500.0}, {"num_rows": 7, "num_tokens": 9},
    ]  # fmt: skip


def test_an_arrow_leads_from_each_stage_to_the_next():
    events = trace_events({"demo": timeline()})
    starts, ends = ({e["id"]: e for e in of_phase(events, phase)} for phase in "sf")
    assert starts.keys() == ends.keys()
    hops = []
    for arrow_id, start in starts.items():
        (left,) = [e for e in of_phase(events, "X", tid=start["tid"]) if e["ts"] <= start["ts"] < e["ts"] + e["dur"]]
        (reached,) = of_phase(events, "X", tid=ends[arrow_id]["tid"], ts=ends[arrow_id]["ts"])
        hops.append((left["name"], left["tid"], reached["name"], reached["tid"]))
    tracks = [track(events, f"stage {index}") for index in range(3)]
    assert sorted(hops) == sorted(
        (f"microbatch {n}", tracks[k], f"microbatch {n}", tracks[k + 1]) for n in range(4) for k in range(2)
    )


def test_a_microbatch_that_is_known_of_one_stage_has_no_arrow():
    made = timeline(2, 3)
    made.spans = [s for s in made.spans if (s.microbatch_id, s.stage_index) != (1, 0)]
    events = trace_events({"demo": made})
    check(events)
    assert len(of_phase(events, "s")) == len(of_phase(events, "f")) == 2


@pytest.mark.parametrize(("skew_s", "num_arrows"), [(-1e-3, 1), (-2.5e-3, 1), (-4e-3, 0)])
def test_stages_whose_clocks_differ(skew_s: float, num_arrows: int):
    """The receiver seems to begin before the sender ends; an arrow never points back in time."""
    start_s = T0 + 2.5e-3 + skew_s
    events = trace_events({"demo": Timeline(2, [Span(0, 0, T0, T0 + 2e-3), Span(0, 1, start_s, start_s + 2e-3)])})
    check(events)
    assert len(of_phase(events, "s")) == num_arrows
    assert all(
        start["ts"] <= end["ts"] for start, end in zip(of_phase(events, "s"), of_phase(events, "f"), strict=True)
    )


def test_a_clock_that_was_set_back_makes_no_slices_that_overlap():
    events = trace_events({"demo": Timeline(1, [Span(0, 0, T0, T0 + 3.0), Span(1, 0, T0 + 1.0, T0 + 2.0)])})
    check(events)
    assert [span(e) for e in of_phase(events, "X")] == [(0, 10**9), (10**9, 2 * 10**9)]


def test_the_scheduler_has_a_track_of_its_own():
    made = timeline(1, 1)
    made.scheduler_spans = [
        SchedulerSpan("schedule", 0, T0 - 0.25, T0 - 0.125), SchedulerSpan("schedule", None, T0 - 0.125, T0),
        SchedulerSpan("update", 0, T0 + 0.5, T0 + 0.75),
    ]  # fmt: skip
    made.passages = [Passage(T0 - 0.5, Milestone.QUEUED, "a", 0.0), Passage(T0 - 0.25, Milestone.SCHEDULED, "a", 0.25)]
    events = trace_events({"demo": made})
    check(events)
    own = [e for e in events if e["tid"] == track(events, "scheduler") and e["ph"] != "M"]
    assert [(e["ph"], e["name"], e["ts"], e.get("dur"), e["args"]) for e in own] == [
        ("i", "queued", 0, None, {"request_id": "a", "waited_s": 0.0}),
        ("X", "schedule", 250_000, 125_000, {"microbatch_id": 0}),
        ("i", "scheduled", 250_000, None, {"request_id": "a", "waited_s": 0.25}),
        ("X", "schedule", 375_000, 125_000, {}),
        ("X", "update", 1_000_000, 250_000, {"microbatch_id": 0}),
    ]


def test_counters():
    made = Timeline(1, occupancies=[Occupancy(T0, 5, 2, 40), Occupancy(T0 + 1, 0, 7, 90)])
    events = trace_events({"demo": made})
    check(events)
    assert [(e["name"], e["ts"], e["args"]) for e in of_phase(events, "C")] == [
        ("requests", 0, {"waiting": 5}), ("sequences", 0, {"running": 2}), ("KV blocks", 0, {"used": 40}),
        ("requests", 1e6, {"waiting": 0}), ("sequences", 1e6, {"running": 7}), ("KV blocks", 1e6, {"used": 90}),
    ]  # fmt: skip


def test_operators_lie_in_their_steps_slice():
    made = timeline(2, 1)
    made.operators = [
        Operator("aten::mm", 0, 1, T0 + 3e-3, T0 + 4e-3),
        Operator("aten::linear", 0, 1, T0 + 2.5e-3, T0 + 4.5e-3),  # begins and ends with the step
        Operator("aten::t", 0, 1, T0 + 2.5e-3, T0 + 2.6e-3),
    ]
    events = trace_events({"demo": made})
    check(events)
    names = [e["name"] for e in of_phase(events, "X", tid=track(events, "stage 1"))]
    assert names == ["microbatch 0", "aten::linear", "aten::t", "aten::mm"]


def test_several_pipelines_are_processes_that_share_nothing():
    events = trace_events({"a": timeline(2, 2), "b": timeline(3, 2)})
    check(events)
    assert [(e["pid"], e["args"]["name"]) for e in of_phase(events, "M", name="process_name")] == [(1, "a"), (2, "b")]
    assert len({e["id"] for e in of_phase(events, "s")}) == 2 * 1 + 2 * 2


def test_nothing_was_recorded():
    events = trace_events({"demo": Timeline(2)})
    check(events)
    assert {e["ph"] for e in events} == {"M"}


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_file_is_what_the_events_are(tmp_path: Path, name: str):
    write_trace(tmp_path / name, {"demo": timeline()}, {"model": 'my "gptj"', "num_stages": 3})
    assert read_trace(tmp_path / name) == trace_events({"demo": timeline()})
    if name == "trace.json":
        assert json.loads((tmp_path / name).read_text())["otherData"] == {"model": 'my "gptj"', "num_stages": "3"}


@pytest.mark.parametrize(("name", "message"), [("", "is a directory"), ("missing/trace.json", "there is no directory")])
def test_where_no_file_can_be(tmp_path: Path, name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        write_trace(tmp_path / name, {"demo": timeline()}, {})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda events: events.insert(0, events.pop()),  # order
        lambda events: of_phase(events, "X")[0].update(dur=4000.0),  # overlaps the next one
        lambda events: events.remove(of_phase(events, "f")[0]),  # an arrow without an end
        lambda events: events.append(events.pop(events.index(of_phase(events, "f")[0])) | {"ts": events[-1]["ts"]}),
        lambda events: of_phase(events, "f")[0].pop("bp"),
        lambda events: of_phase(events, "X")[0].update(tid=7),  # no such track
    ],
)  # fmt: skip
def test_the_rules_find_what_breaks_them(spoil: Any):
    events = trace_events({"demo": timeline()})
    spoil(events)
    with pytest.raises((AssertionError, ValueError)):
        check(events)
