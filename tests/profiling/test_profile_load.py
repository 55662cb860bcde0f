import time
from pathlib import Path

import pytest

from gptj_serve.errors import ConfigError, DataError
from gptj_serve.profiling.load import PlannedRequest, trace_requests, uniform_requests

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace.csv"


def test_requests_of_one_size():
    assert uniform_requests(3, 5, 7, max_tokens=12) == [PlannedRequest(0.0, 5, 7)] * 3
    with pytest.raises(ConfigError, match=r"--prompt-tokens=6, --new-tokens=7: together 13; .* n_positions=12"):
        uniform_requests(3, 6, 7, max_tokens=12)


def test_a_trace_brings_the_first_that_fit(trace: Path):
    trace.write_text(
        HEADER + "2023-11-16 18:15:46.6805900,60,5\n2023-11-16 18:15:50.9305900,30,4\n2023-11-16 18:15:51.0000000,9,0\n"
        "2023-11-16 18:15:51.1805900,31,33,more\n\n2023-11-16 18:15:52.9305900,1,1\n"
    )
    assert trace_requests(trace, 2, max_tokens=64) == [PlannedRequest(0.0, 30, 4), PlannedRequest(0.25, 31, 33)]
    assert [r.num_prompt_tokens for r in trace_requests(trace, 9, max_tokens=100)] == [60, 30, 31, 1]


def test_arrivals_may_be_seconds(trace: Path):
    trace.write_text(HEADER + "5,1,1\n5.5,2,2\n7,3,3\n")
    assert [r.arrival_s for r in trace_requests(trace, 9, max_tokens=64)] == [0.0, 0.5, 2.0]
    trace.write_text(HEADER + "0,1,1\n1e-05,2,2\n1.5e1,3,3\n")
    assert [r.arrival_s for r in trace_requests(trace, 9, max_tokens=64)] == [0.0, 1e-05, 15.0]


def test_arrivals_may_have_time_zones(trace: Path):
    """A quarter of a second after the first, and then an hour, told in other zones; digits beyond microseconds don't
    count."""
    times = ("2023-11-16 18:15:46.6805900+00:00", "2023-11-16T19:15:46.930590099+01:00", "2023-11-16 19:15:46.93059Z")
    trace.write_text(HEADER + "".join(f"{at},1,1\n" for at in times))
    arrivals = [request.arrival_s for request in trace_requests(trace, 9, max_tokens=64)]
    assert arrivals == pytest.approx([0.0, 0.25, 3600.25])


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
def test_times_without_a_zone_pass_evenly_wherever_they_are_read(
    trace: Path, zone: str, monkeypatch: pytest.MonkeyPatch
):
    """Also when clocks are put back there: the first came in summer, the second in winter."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        trace.write_text(HEADER + "2023-10-29 01:30:00,1,1\n2023-10-29 03:30:00,1,1\n")
        assert [request.arrival_s for request in trace_requests(trace, 9, max_tokens=64)] == [0.0, 7200.0]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("yesterday,1,1\n", ":2: arrival='yesterday': must be seconds, or a date"),
        ("nan,1,1\n", ":2: arrival='nan': must be seconds, or a date"),
        ("inf,1,1\n", ":2: arrival='inf': must be seconds, or a date"),
        ("1,1\n", ":2: '1,1': must have arrival, prompt tokens and output tokens"),
        ("1,1,1\n2,x,1\n", ":3: prompt tokens='x': must be a whole number, at least 1"),
        ("1,0,1\n", ":2: prompt tokens='0': must be a whole number, at least 1"),
        ("1,1,-1\n", ":2: output tokens='-1': must be a whole number, at least 0"),
        ("2,1,1\n1,1,1\n", ":3: arrival='1': is before that of the line above"),
        ("1,64,1\n2,3,0\n", ": has no request of 1 to 64 tokens with an output"),
        ("", ": has no request of 1 to 64 tokens with an output"),
    ],
)
def test_a_trace_that_is_none(trace: Path, lines: str, message: str):
    trace.write_text(HEADER + lines)
    with pytest.raises(DataError) as refused:
        trace_requests(trace, 9, max_tokens=64)
    assert str(refused.value).startswith(f"{trace}{message}")


def test_a_trace_that_is_not_there(trace: Path):
    with pytest.raises(DataError, match=r"trace.csv: can't be read: No such file or directory"):
        trace_requests(trace, 9, max_tokens=64)


def test_prompts_are_the_same_every_time_and_begin_differently():
    planned = PlannedRequest(0.0, 20, 3)
    first, again, other = (planned.request(name, num_token_ids=1000) for name in ("a", "a", "b"))
    assert first == again
    assert len(first.prompt_token_ids) == 20
    assert set(first.prompt_token_ids) <= set(range(1000))
    assert first.prompt_token_ids[:4] != other.prompt_token_ids[:4]
    assert first.sampling is not None
    assert (first.sampling.max_new_tokens, first.sampling.ignore_eos) == (3, True)
