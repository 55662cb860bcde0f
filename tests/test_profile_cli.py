"""`gptj-serve profile` as people use it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from trace_format import read_trace

from gptj_serve.cli import main


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
            main(["profile", *map(str, arguments)])
        captured = capfd.readouterr()
        return Outcome(ended.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    """The demo with a thread for each stage, wherever this runs."""
    pipeline = {"num_stages": 2, "kernels": "torch", "stage": {"num_threads": 1}}
    args = {"model_name": "[mine]", "pipeline": pipeline}
    application = {"name": "gptj", "import_path": "gptj_serve.serving.app:build", "args": args}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"applications": [application]}))
    return file


def steps(file: Path) -> list[dict[str, Any]]:
    return [event for event in read_trace(file) if event.get("cat") == "stage"]


def test_profile_of_a_deployment(run: Any, deployment: Path, tmp_path: Path):
    outcome = run(deployment, "--requests", 3, "--prompt-tokens", 10, "--new-tokens", 2, "--concurrency", 1)
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("[mine] in float32, torch kernels, 1 thread per stage\n")
    for text in ("bubble", "handoff µs", "0-3", "4-5", "3 requests: 30 prompt tokens, 6 generated, in 6 steps and"):
        assert text in outcome.out
    assert "took longer" not in outcome.out
    names = {event["args"]["name"] for event in read_trace(tmp_path / "trace.json") if event["name"] == "process_name"}
    assert names == {"[mine]"}
    assert sum(event["args"]["num_tokens"] for event in steps(tmp_path / "trace.json")) == 2 * 3 * 11


def test_profile_of_a_trace_with_operators_as_json(run: Any, deployment: Path, tmp_path: Path):
    (tmp_path / "load.csv").write_text("arrival,prompt,output\n0,1000,30\n0.1,12,2\n0.2,5,3\n0.3,6,1\n")
    output = tmp_path / "deep.json.gz"
    arguments = ("--trace", "load.csv", "--requests", 2, "--operators", "-o", output, "--json")
    outcome = run(deployment, *arguments)
    assert outcome.status == 0, outcome.err
    summary = json.loads(outcome.out)
    told = [summary[name] for name in ("model", "dtype", "kernels", "threads_per_stage")]
    assert told == ["[mine]", "float32", "torch", 1]
    assert (summary["num_finished"], summary["num_prompt_tokens"], summary["num_tokens_generated"]) == (2, 17, 5)
    assert [stage["num_steps"] for stage in summary["stages"]] == [summary["num_steps"]] * 2
    assert len(steps(output)) == 2 * summary["num_steps"]
    assert any(event["name"] == "aten::layer_norm" for event in read_trace(output))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "missing.yaml: can't be read: No such file or directory"),
        (["--output", "."], ".: is a directory; name a file for the trace"),
        (["--output", "missing/trace.json"], "missing/trace.json: there is no directory"),
        (["--trace", "missing.csv"], "missing.csv: can't be read: No such file or directory"),
        (["--trace", "a.csv", "--new-tokens", "3"], "--new-tokens=3: can't be set beside --trace"),
        (["--trace", "a.csv", "--prompt-tokens", "3"], "--prompt-tokens=3: can't be set beside --trace"),
        (["--prompt-tokens", "1000", "--new-tokens", "25"], "--prompt-tokens=1000, --new-tokens=25: together 1025; "),
    ],
    ids=" ".join,
)
def test_errors_are_one_line(run: Any, one_torch_thread: None, arguments: list[str], message: str):
    outcome = run(*arguments)
    assert outcome.status == 1
    assert outcome.err.startswith(f"gptj-serve: {message}")
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


@pytest.mark.parametrize("option", ["--requests", "--prompt-tokens", "--new-tokens", "--concurrency"])
def test_numbers_begin_with_one(run: Any, option: str):
    outcome = run(option, 0)
    assert outcome.status == 2
    assert option in outcome.err
