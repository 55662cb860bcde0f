import pytest

from gptj_serve.engine.timeline import Timeline
from gptj_serve.simulation.schedule import simulate_schedule
from gptj_serve.types import EngineRequest, Event
from tests.engine.fake_stages import FakeStages, expected_events, generate_request, make_scheduler


def run(requests: list[EngineRequest], arrivals_s: list[float] | None = None, **limits: int) -> tuple[Timeline, list]:
    scheduler = make_scheduler(**limits)
    stages = FakeStages(scheduler.blocks.block_size)
    events: list[tuple[float, Event]] = []
    timeline = simulate_schedule(
        scheduler,
        zip(arrivals_s or [0.0] * len(requests), requests, strict=True),
        lambda shape, stage_index: 1.0,
        stages.run,
        lambda now_s, new: events.extend((now_s, event) for event in new),
    )
    assert scheduler.blocks.num_used == 0
    return timeline, events


def decoding(count: int, num_tokens: int = 4) -> list[EngineRequest]:
    return [generate_request(str(i), [i], max_new_tokens=num_tokens, ignore_eos=True) for i in range(count)]


def test_one_sequence_leaves_all_stages_but_one_idle():
    timeline, _ = run(decoding(1, 2), num_stages=3)
    assert timeline.grid(1.0) == "stage 0 | 0 . . 1 . .\nstage 1 | . 0 . . 1 .\nstage 2 | . . 0 . . 1"
    assert timeline.bubble_ratio == pytest.approx(2 / 3)


def test_as_many_sequences_as_stages_keep_all_of_them_busy():
    timeline, _ = run(decoding(3), num_stages=3)
    steady = timeline.grid(1.0).splitlines()
    assert all("." not in line[20:-4] for line in steady)


def test_sixteen_sequences_over_four_stages_run_as_four_microbatches():
    """Without a cap on decode rows they would run as one, and three stages would idle: a ratio of 0.75."""
    timeline, _ = run(decoding(16, 40), num_stages=4, num_blocks=400)
    assert timeline.bubble_ratio < 0.1


def test_requests_are_answered_as_they_arrive():
    requests = decoding(3)
    timeline, events = run(requests, [0.0, 2.5, 100.0], num_stages=2)
    for request in requests:
        assert [event for _, event in events if event.request_id == request.request_id] == expected_events(request)
    first_s = {
        request.request_id: next(s for s, e in events if e.request_id == request.request_id) for request in requests
    }
    assert first_s["0"] == 2.0
    assert 4.5 <= first_s["1"] <= 6.0
    assert first_s["2"] == 102.0
    assert timeline.duration_s == pytest.approx(100 + 4 * 2)


def test_nothing_to_do():
    timeline, _ = run([])
    assert (timeline.duration_s, timeline.bubble_ratio, timeline.grid(1.0)) == (0.0, 0.0, "stage 0 | ")


def test_a_simulated_step_says_what_it_computes():
    timeline, _ = run([generate_request("a", [1, 2, 3], max_new_tokens=2, ignore_eos=True)])
    assert [(span.num_rows, span.num_tokens) for span in timeline.spans] == [(1, 3), (1, 1)]
