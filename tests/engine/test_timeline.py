from gptj_serve.engine.timeline import SchedulerSpan, Span, Timeline


def test_time_with_work_in_flight():
    """From 0 to 3 and from 10 to 11, with a pause between the stages of microbatch 0; 2 is within that of 1."""
    spans = [(0, 0, 0.0, 1.0), (0, 1, 2.0, 3.0), (2, 0, 10.25, 10.5), (1, 0, 10.0, 11.0)]
    timeline = Timeline(2, [Span(*span) for span in spans])
    assert timeline.duration_s == 11.0
    assert timeline.in_flight_s == 4.0
    assert [span.microbatch_id for span in timeline.of_stage(0)] == [0, 1, 2]
    assert Timeline(2).in_flight_s == 0.0


def test_a_microbatch_is_on_its_way_from_scheduler_to_scheduler():
    """Handed to its only stage in 0.25 and back in 0.5; that nothing was found to schedule is no way."""
    scheduler_spans = [
        SchedulerSpan("schedule", 0, -1.0, -0.25), SchedulerSpan("schedule", None, -0.25, 0.0),
        SchedulerSpan("update", 7, 0.0, 0.25),  # of one that was made before this began
        SchedulerSpan("update", 0, 2.5, 3.0),
    ]  # fmt: skip
    assert Timeline(1, [Span(0, 0, 0.0, 2.0)], scheduler_spans).in_flight_s == 2.75
