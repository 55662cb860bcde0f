"""`gptj-serve simulate` and `bench` as people use them."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from gptj_serve.bench_cli import remarks
from gptj_serve.cli import main
from gptj_serve.simulation.cost_model import CostModel, ModelShape


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        captured = capfd.readouterr()
        return Outcome(ended.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture
def cost(tmp_path: Path) -> Path:
    model = ModelShape(name="a-model", num_layers=4, max_sequence_tokens=128, head_layers=1.0)
    file = tmp_path / "cost.json"
    CostModel(source="measured", model=model, weights_s=1e-3, token_s=1e-5, engine_step_s=1e-3).write(file)
    return file


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Sixty requests in a minute, and one that does not fit."""
    lines = ["arrival,prompt,output", *(f"{second},{10 + second},20" for second in range(60)), "60,200,20"]
    file = tmp_path / "trace.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_a_trace_is_served_in_simulated_time(run, trace: Path, cost: Path):
    result = run("simulate", trace, "--cost", cost, "--stages", 2, "--output", "result.json")
    assert (result.status, result.err) == (0, "")
    assert "60, 0 of them refused" in result.out
    assert "100.00% of the requests" in result.out
    assert "ESTIMATE" not in result.out
    document = json.loads(Path("result.json").read_text())
    assert document["settings"]["num_stages"] == 2
    assert document["figures"]["num_requests"] == 60
    assert document["figures"]["gpu_hours"] == pytest.approx(2 * document["figures"]["pipeline_hours"])
    assert document["moments"][0]["num_running"] == 1


def test_json_is_what_the_file_has(run, trace: Path, cost: Path):
    result = run("simulate", trace, "--cost", cost, "--json", "--copies", 3, "--rate", 2, "--output", "result.json")
    document = json.loads(result.out)
    assert document == json.loads(Path("result.json").read_text())
    assert document["figures"]["num_requests"] == 180
    assert 30 <= document["figures"]["duration_s"] <= 60


def test_a_config_gives_limits_and_scaling(run, trace: Path, cost: Path):
    args = {
        "pipeline": {
            "num_stages": 2,
            "stage": {"num_gpus": 0.5},
            "kv_cache": {"num_tokens": 256},
            "scheduler": {"max_num_sequences": 2},
        },
        "autoscaling": {"min_pipelines": 1, "max_pipelines": 3, "target_drain_s": 0.5, "upscale_delay_s": 0.0},
    }
    application = {"name": "gptj", "import_path": "gptj_serve.serving.app:build", "args": args}
    Path("serve.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    result = run("simulate", trace, "--cost", cost, "--config", "serve.yaml", "--rate", 20, "--startup-s", 1, "--json")
    document = json.loads(result.out)
    assert document["settings"]["num_kv_tokens"] == 256
    assert document["settings"]["max_pipelines"] == 3
    assert document["figures"]["most_pipelines"] > 1
    assert document["figures"]["gpu_hours"] == pytest.approx(document["figures"]["pipeline_hours"])
    fixed = run("simulate", trace, "--cost", cost, "--config", "serve.yaml", "--pipelines", 2, "--json")
    assert json.loads(fixed.out)["figures"]["most_pipelines"] == 2


def test_a_pool_that_gpus_size_themselves_must_be_said(run, trace: Path, cost: Path):
    args = {"pipeline": {"stage": {"num_gpus": 1}}}
    application = {"name": "gptj", "import_path": "gptj_serve.serving.app:build", "args": args}
    Path("serve.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    result = run("simulate", trace, "--cost", cost, "--config", "serve.yaml")
    assert result.status == 1
    assert "pipeline.kv_cache.num_tokens is not set" in result.err
    result = run("simulate", trace, "--cost", cost, "--config", "serve.yaml", "--kv-tokens", 512, "--json")
    assert json.loads(result.out)["settings"]["num_kv_tokens"] == 512


def test_a_picture_is_drawn(run, trace: Path, cost: Path):
    result = run("simulate", trace, "--cost", cost, "--plot", "course.png", "--max-pipelines", 2)
    assert (result.status, result.err) == (0, "")
    assert Path("course.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pipelines", 2, "--max-pipelines", 3], "--max-pipelines=3"),
        (["--stages", 9], "num_stages=9"),
        (["--cost", "none.json"], "none.json: can't be read"),
        (["--plot", "course.gif"], "--plot=course.gif"),
        (["--kv-tokens", 5], "has no request of 1 to 16 tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(run, trace: Path, cost: Path, options: list[object], message: str):
    result = run("simulate", trace, "--cost", cost, *options)
    assert result.status == 1
    assert message in result.err
    assert result.err.count("\n") == 1


def test_an_estimate_says_that_it_is_one(run, trace: Path):
    made = run("bench", "--estimate", "gpt-j-6b", "--bandwidth-gb-s", 1400, "--tflops", 150, "--output", "a.json")
    assert (made.status, made.err) == (0, "")
    assert "ESTIMATE" in made.out
    result = run("simulate", trace, "--cost", "a.json")
    assert "gpt-j-6b" in result.out
    assert "An ESTIMATE" in result.out


def test_a_measured_model_says_what_was_not_measured(cost: Path):
    notes = {"stage_times": 70, "stage_error_mean": 0.02, "stage_error_p90": 0.05, "max_context_tokens": 8224}
    measured = CostModel.read(cost)
    whole, part = (
        " ".join(remarks(measured.model_copy(update={"notes": {**notes, "stage_times_left_out": count}})))
        for count in (0, 12)
    )
    for text in (whole, part):
        assert "off by 2.0% on average, p90 5.0%" in text
        assert "up to 8,224 context tokens" in text
        assert "handoff_s and handoff_token_s are 0: set them by hand for stages on several hosts" in text
    assert "left out" not in whole
    assert "12 times were left out" in part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tflops", 3], "--estimate"),
        (["--estimate", "gpt-j-6b", "--tflops", 3], "--bandwidth-gb-s"),
        (["--estimate", "no-model", "--tflops", 3, "--bandwidth-gb-s", 3], "no-model"),
        (["serve.yaml", "--estimate", "gpt-j-6b", "--tflops", 3, "--bandwidth-gb-s", 3], "serve.yaml"),
        (["none.yaml"], "none.yaml: can't be read"),
    ],
)
def test_a_bench_of_nothing_is_refused(run, options: list[object], message: str):
    result = run("bench", *options)
    assert result.status == 1
    assert message in result.err
    assert not Path("cost.json").exists()
