from gptj_serve.engine.timeline import Span, Timeline


def test_time_with_work_in_flight():
    """From 0 to 3 and from 10 to 11, with a pause between the stages of microbatch 0; 2 is within that of 1."""
    spans = [(0, 0, 0.0, 1.0), (0, 1, 2.0, 3.0), (2, 0, 10.25, 10.5), (1, 0, 10.0, 11.0)]
    timeline = Timeline(2, [Span(*span) for span in spans])
    assert timeline.duration_s == 11.0
    assert timeline.in_flight_s == 4.0
    assert [span.microbatch_id for span in timeline.of_stage(0)] == [0, 1, 2]
    assert Timeline(2).in_flight_s == 0.0
