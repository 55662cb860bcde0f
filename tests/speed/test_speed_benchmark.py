"""`python -m benchmarks.speed` runs, and what it reads off its measurements is right."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.speed.batches import SCENARIOS, Scenario
from benchmarks.speed.cli import main
from benchmarks.speed.contestants import BF16, CONTESTANTS, FP32, INT8, Settings
from benchmarks.speed.load import batch_requests, drawn_shapes, read_trace, trace_requests
from benchmarks.speed.mixed_load import at_equal_latency
from benchmarks.speed.models import MODELS, TINY, Cost, decode_cost, kv_bytes_per_token, prefill_cost, weight_bytes
from benchmarks.speed.options import CONDITIONS, check_comparable
from benchmarks.speed.ours_contestant import new_scheduler
from benchmarks.speed.pipeline_level import bubble_ratio
from benchmarks.speed.plot import draw
from benchmarks.speed.report import significant
from benchmarks.speed.results import Results, Spread, ratios, spread
from benchmarks.speed.static_batches import OnToken, serve_in_batches
from benchmarks.speed.streams import Request, Stream, agreement, batch_figures, load_figures
from gptj_serve.planner import Model, Resources, plan
from gptj_serve.simulation.steps_source import any_answer
from gptj_serve.types import EngineRequest, SamplingParams, Task

PEERS = [name for name in ("transformers", "ctranslate2") if importlib.util.find_spec(name)]


def run_quick(file: Path, *options: str, status: int = 0, environment: Mapping[str, str] = {}) -> tuple[str, Results]:
    """What it printed and wrote."""
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--output", str(file), *options]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
    )
    assert run.returncode == status, run.stdout + run.stderr
    return run.stdout, Results.read(file)


@pytest.mark.timeout(600)
def test_engines_side_by_side(tmp_path: Path) -> None:
    names = "ours-fp32,transformers-fp32,ctranslate2-fp32"
    printed, results = run_quick(tmp_path / "speed.json", "--only", "engine", "--contestants", names)
    rows = results.groups["engine"]
    present = ["ours-fp32", *(f"{peer}-fp32" for peer in PEERS)]
    assert [row["contestant"] for row in rows] == present * 3
    assert [row["same_tokens"] for row in rows] == [1.0] * len(rows), "they don't compute the same model"
    assert all(row["prefill_s"].median > 0 and row["step_of_bound"] > 0 for row in rows)
    missing = {"transformers", "ctranslate2"} - set(PEERS)
    assert results.left_out == {f"{peer}-fp32": f"{peer} is not installed" for peer in missing}
    for row in rows:
        assert re.search(rf"{row['contestant']} .* {significant(row['overall_rate'].median)} ", printed)
    ours = rows[0]
    peers = rows[1 : len(present)]
    if peers:
        best = max(row["overall_rate"].median for row in peers)
        assert ours["overall_rate_to_best_peer"] == pytest.approx(ours["overall_rate"].median / best)
    else:
        assert "overall_rate_to_best_peer" not in ours


@pytest.mark.timeout(600)
def test_load_and_pipelines(tmp_path: Path) -> None:
    options = ("--only", "load,pipeline", "--contestants", "ours-fp32")
    printed, results = run_quick(tmp_path / "speed.json", *options)
    (row,) = results.groups["load"]
    assert row["output_rate"].median > 0
    assert row["ttft_p99_s"].median >= row["ttft_p50_s"].median > 0
    stages = {(row["kind"], row["num_stages"]): row for row in results.groups["pipeline"]}
    assert list(stages) == [("in process", 1), ("in process", 2), ("linked", 1), ("linked", 2)]
    for (_, num_stages), row in stages.items():
        assert 0 <= row["bubble_ratio"].median < 1
        assert ("handoff_s" in row) == (num_stages > 1)
    machine = json.loads((tmp_path / "speed.json").read_text())["machine"]
    assert machine["operations_per_s"]["fp32"]["torch"] > 0
    for (kind, num_stages), row in stages.items():
        assert re.search(rf"{kind} +│ +{num_stages} .* {significant(row['concurrent_rate'].median)} ", printed)
    assert "--contestants has no effect on pipeline" in printed
    assert (results.options["model"], results.options["threads"], results.options["seconds"]) == ("tiny", 1, 3.0)
    assert (results.options["trace"], results.options["peer_batches"]) == ("drawn", [1, 8, 32])


@pytest.mark.parametrize(
    "option", [("--only", "engines"), ("--contestants", "theirs"), ("--model", "7b"), ("--model", "405m,6b")]
)
def test_unknown_names_are_refused(option: tuple[str, str]) -> None:
    assert repr(option[1]) in refused(*option)


def refused(*arguments: str) -> str:
    """What the command says of its arguments, before it measures anything, in one line."""
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == 2, result.output
    assert "measuring" not in result.stdout
    return " ".join(result.stderr.replace("│", "").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rates 0.1,x", "Invalid value for --rates: 'x' is no number above 0"),
        ("--peer-batches 1,0", "Invalid value for --peer-batches: '0' is no whole number above 0"),
        ("--rounds -1", "Invalid value for '--rounds'"),
        ("--rounds 0", "Invalid value for '--rounds'"),
        ("--shrink 0", "Invalid value for '--shrink'"),
        ("--shrink 2", "Invalid value for --shrink: is of a --trace, which there is none of"),
        (
            "--only load --rates 50",
            "Invalid value for --rates: rate=50 for 300 s takes 15000 requests; the trace has 2000",
        ),
        ("--scenarios 1x2+1", "Invalid value for --scenarios: '1x2+1' has no batch, prompt or second token"),
        ("--scenarios 1x2000+49", "Invalid value for --scenarios: '1x2000+49' exceeds the model's 2048 positions"),
        ("--only service --threads 1", "Invalid value for --threads: has no effect on service"),
        ("--only pipeline,service --kv-tokens 9", "Invalid value for --kv-tokens: has no effect on pipeline, service"),
        ("--only load --rounds 2", "Invalid value for --rounds: has no effect on load"),
        (
            "--output missing/speed.json",
            "Invalid value for --output: missing/speed.json: there is no directory missing",
        ),
        ("--compare missing.json", "'missing.json' does not exist"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments.split())


def test_a_trace_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n")
    assert "arrival='yesterday': must be seconds" in refused("--trace", str(tmp_path / "trace.csv"))


@pytest.mark.timeout(600)
def test_a_group_that_fails_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    """Stages can't be linked by sockets whose paths are too long for the system."""
    place = tmp_path / ("long" * 30)
    place.mkdir()
    options = ("--only", "pipeline,engine", "--contestants", "ours-fp32")
    printed, results = run_quick(tmp_path / "speed.json", *options, status=1, environment={"TMPDIR": str(place)})
    assert list(results.groups) == ["engine"]
    reason = "RuntimeError: the process of stage 0 has ended; what it printed says why"
    assert results.left_out == {"pipeline": reason}
    assert f"left out: pipeline: {reason}" in printed


def test_costs_are_the_planners() -> None:
    config = MODELS["405m"]
    for precision, dtype in ((FP32, "float32"), (BF16, "bfloat16")):
        planned = plan(Model(config), Resources(dtype=dtype))
        assert weight_bytes(config, precision) == planned.weight_bytes
        assert kv_bytes_per_token(config, precision) == planned.kv_bytes_per_token
        read = planned.stages[0].read_bytes
        assert decode_cost(config, precision, 1, 0).num_bytes == pytest.approx(read, rel=1e-3)  # but biases and norms
    assert weight_bytes(config, INT8) < 0.4 * weight_bytes(config, FP32)


def test_operations_are_counted() -> None:
    """As many as the products of a forward pass have, taken one by one."""
    width, inner, layers, vocab = TINY.n_embd, TINY.inner_dim, TINY.n_layer, TINY.vocab_size
    per_token = 2 * layers * (4 * width * width + 2 * width * inner)
    head = 2 * width * vocab
    scores_and_values = 2 * 2 * width * layers
    assert decode_cost(TINY, FP32, 3, 50).num_operations == 3 * (per_token + head + 50 * scores_and_values)
    by_position = sum(position * scores_and_values for position in range(1, 17))
    prefill = prefill_cost(TINY, FP32, 2, 16).num_operations
    assert prefill == pytest.approx(2 * (16 * per_token + head + by_position), rel=0.01)


def test_the_larger_of_both_bounds() -> None:
    assert Cost(100, 10).bound_s(bytes_per_s=10, operations_per_s=10) == 10
    assert Cost(100, 1000).bound_s(bytes_per_s=10, operations_per_s=10) == 100


def test_batch_figures() -> None:
    """Two sequences that decode together from 2.0 to 5.0; one had begun before."""
    early = Stream(0.0, [1.0, 2.1, 3.0, 4.0, 5.0], [1] * 5)
    late = Stream(0.0, [2.0, 3.0, 4.0, 5.0, 6.0], [1] * 5)
    figures = batch_figures([early, late])
    assert figures.prefill_s == 2.0
    assert figures.step_s == pytest.approx(((5.0 - 2.1) / 3 + 1.0) / 2)
    assert figures.decode_rate == pytest.approx(2 / figures.step_s)
    assert figures.overall_rate == pytest.approx(10 / 6)


@pytest.mark.parametrize(
    "scenario",
    [*SCENARIOS, Scenario(8, 120, 8), Scenario(3, 1, 15), Scenario(5, 16, 1)],
    ids=lambda scenario: scenario.name,
)
def test_a_whole_batch_fits_the_pool_at_once(scenario: Scenario) -> None:
    settings = Settings(Path("none"), MODELS["405m"], 1, scenario.num_tokens, max_microbatch_tokens=512)
    scheduler = new_scheduler(settings, scenario.batch)
    sampling = SamplingParams(max_new_tokens=scenario.num_new, ignore_eos=True)
    for index in range(scenario.batch):
        prompt = [index, *[1] * (scenario.num_prompt - 1)]
        request = EngineRequest(request_id=str(index), task=Task.GENERATE, prompt_token_ids=prompt, sampling=sampling)
        scheduler.add(request)
    num_together = 0
    while (microbatch := scheduler.schedule()) is not None:
        num_together = max(num_together, scheduler.num_running)
        scheduler.update(any_answer(microbatch))
    assert num_together == scenario.batch
    assert scheduler.num_preemptions == 0


def test_load_figures() -> None:
    requests = [Request(0.0, [1], 3), Request(1.0, [1], 2), Request(8.0, [1], 2)]
    streams = [Stream(0.0, [1.0, 4.0, 5.0], [1] * 3), Stream(1.0, [6.0, 8.5], [1] * 2), Stream(8.0)]
    figures = load_figures(requests, streams, seconds=9.0)
    assert figures.output_rate == pytest.approx(4 / 6)  # tokens after 3.0, up to 9.0
    assert figures.ttft_p50_s == 1.0
    assert figures.ttft_p99_s == pytest.approx(5.0 - 0.02 * 4.0)  # of 1, 1 and 5
    assert figures.intertoken_p99_s == pytest.approx(3.0 - 0.02 * 0.5)  # of 1, 2.5 and 3
    assert figures.num_unfinished == 1


def test_what_comes_after_the_load_does_not_count() -> None:
    """A peer finishes the batch that it has begun; ours gives up what is unfinished. Both had the same by then."""
    requests = [Request(0.0, [1], 4), Request(5.0, [1], 2)]
    finished = [Stream(0.0, [1.0, 4.0, 8.0, 30.0], [1] * 4), Stream(5.0, [20.0, 21.0], [1] * 2)]
    given_up = [Stream(0.0, [1.0, 4.0, 8.0], [1] * 3), Stream(5.0)]
    figures = load_figures(requests, finished, seconds=9.0)
    assert figures == load_figures(requests, given_up, seconds=9.0)
    assert figures.ttft_p50_s == pytest.approx((1.0 + (9.0 - 5.0)) / 2)
    assert figures.num_unfinished == 2


def test_agreement_ends_at_the_first_difference() -> None:
    one, other = Stream(0.0, [1.0] * 4, [5, 6, 7, 8]), Stream(0.0, [1.0] * 4, [5, 6, 9, 8])
    assert agreement([one], [other]) == 0.5
    assert agreement([one, one], [one, other]) == 0.75


def test_bubbles_are_of_the_time_that_all_meters_show() -> None:
    def meter(*spans: tuple[float, float]) -> dict[str, list[dict[str, float]]]:
        return {"steps": [{"started_at": start, "duration_s": end - start} for start, end in spans]}

    assert bubble_ratio([meter((0, 1), (1, 2), (2, 3))]) == 0
    assert bubble_ratio([meter((0, 1), (2, 3)), meter((1, 2), (3, 4))]) == pytest.approx(1 / 2)  # of 1.0 to 3.0


def test_what_waits_when_a_batch_ends_is_the_next() -> None:
    batches: list[int] = []

    def run(batch: Sequence[Request], on_token: OnToken) -> None:
        batches.append(len(batch))
        time.sleep(0.05)
        for row, request in enumerate(batch):
            on_token(row, request.prompt[0])

    requests = [Request(0.0, [index], 1) for index in range(5)] + [Request(0.3, [5], 1), Request(50.0, [6], 1)]
    streams = serve_in_batches(run, requests, max_batch=3, limit_s=1.0)
    assert batches == [3, 2, 1]
    assert [stream.token_ids for stream in streams] == [[0], [1], [2], [3], [4], [5], []]
    assert streams[5].times[0] >= 0.3


def test_prompts_have_nothing_in_common() -> None:
    requests = batch_requests(TINY, 8, 16, 4, seed=0) + batch_requests(TINY, 8, 16, 4, seed=1)
    assert len({tuple(request.prompt[:8]) for request in requests}) == 16
    assert requests[0] == batch_requests(TINY, 8, 16, 4, seed=0)[0]
    assert all(0 < token_id < TINY.vocab_size for request in requests for token_id in request.prompt)


def test_a_trace_is_compressed_to_the_rate(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:{minute:02}:00.1234560,{10 + minute},{minute}" for minute in range(60)]
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines, "2023-11-16 19:00:00.0,9000,1"]))
    shapes = read_trace(file, n_positions=256)
    assert shapes[0] == (0.0, 11, 1)  # what generates nothing, or does not fit, is left out
    assert len(shapes) == 59
    requests = trace_requests(TINY, shapes, rate=2, seconds=10, seed=0)
    assert [request.arrival_s for request in requests] == pytest.approx([0.5 * index for index in range(20)])
    assert all(len(request.prompt) == 10 + request.num_new_tokens for request in requests)
    assert read_trace(file, n_positions=256, shrink=10)[0] == (0.0, 2, 1)
    with pytest.raises(ValueError, match="rate=20 for 10 s takes 200 requests; the trace has 59"):
        trace_requests(TINY, shapes, rate=20, seconds=10, seed=0)
    assert all(prompt + new <= 256 for _, prompt, new in drawn_shapes(256))


def test_rates_are_compared_at_equal_latency() -> None:
    def row(contestant: str, p99_s: float, rate: float) -> dict[str, object]:
        values = {"intertoken_p99_s": p99_s, "output_rate": rate}
        return {"contestant": contestant, **{name: spread([value]) for name, value in values.items()}}

    rows = [row("ours-fp32", 0.2, 30), row("ours-fp32", 0.1, 20), row("transformers-fp32", 0.15, 25)]
    strict, loose = at_equal_latency(rows)
    assert {name: row["output_rate"].median for name, row in strict["best"].items()} == {"ours-fp32": 20}
    assert {name: row["output_rate"].median for name, row in loose["best"].items()} == {
        "ours-fp32": 30,
        "transformers-fp32": 25,
    }


def test_all_engines_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = {name: spread([1.0, 2.0, 4.0]) for name in ("prefill_s", "decode_rate", "overall_rate")}
    load = {name: spread([1.0]) for name in ("output_rate", "intertoken_p99_s", "ttft_p50_s", "ttft_p99_s")}
    rows = [{"scenario": "1 x 2 + 3", "contestant": name, **figures} for name in CONTESTANTS]
    loaded = [{"contestant": name, "max_batch": 8, "rate": rate, **load} for name in CONTESTANTS for rate in (1, 2)]
    file = tmp_path / "speed.svg"
    draw(file, Results(groups={"engine": rows, "load": loaded}))
    text = file.read_text()
    assert [name for name in CONTESTANTS if f"<!-- {name} -->" not in text] == []
    assert "<!-- output tokens/s by p99 of the first token, s -->" in text


def test_a_later_run_is_compared(tmp_path: Path) -> None:
    def results(rate: float, contestant: str = "ours-fp32") -> Results:
        row = {"scenario": "1 x 2 + 3", "contestant": contestant, "decode_rate": spread([rate, 2 * rate, 3 * rate])}
        return Results(groups={"engine": [row | {"step_of_bound": rate / 20, "prefill_of_bound": None}]})

    file = tmp_path / "earlier.json"
    results(5.0).write(file)
    earlier = Results.read(file)
    assert earlier.groups["engine"][0]["decode_rate"] == Spread(10, 5, 15)
    (compared,) = ratios(results(10.0), earlier)
    assert compared["ratios"] == {"decode_rate": 2.0, "step_of_bound": 2.0}
    assert compared["contestant"] == "ours-fp32"
    assert ratios(results(10.0, "ours-bf16"), earlier) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "6b", "threads": 4},
            "can't be compared: --model is 6b here, 405m there; --threads is 4 here, 2 there",
        ),
        ({"trace": "other.csv"}, "--trace is other.csv here, drawn there"),
        ({"shrink": 2}, "--shrink is 2 here, 1 there"),
        ({"seconds": 30.0}, "--seconds is 30.0 here, 300.0 there"),
    ],
)
def test_unlike_runs_are_not_compared(changes: dict[str, object], message: str) -> None:
    options = dict.fromkeys(CONDITIONS) | {
        "model": "405m",
        "threads": 2,
        "trace": "drawn",
        "shrink": 1,
        "seconds": 300.0,
    }
    earlier = Results(options, groups={"engine": [], "load": []})
    check_comparable(options, earlier, ["load", "service"])
    with pytest.raises(typer.BadParameter, match=re.escape(message)):
        check_comparable(options | changes, earlier, ["load", "service"])
    if "model" not in changes:  # the engines don't depend on the load
        check_comparable(options | changes, earlier, ["engine"])
    with pytest.raises(typer.BadParameter, match="has no figures of pipeline, but of engine, load"):
        check_comparable(options, earlier, ["pipeline"])
